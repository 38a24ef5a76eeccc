"""The evidence of fusion and calibration: resumed runs, tables that are the lines, held-out groups unseen."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, matthews_corrcoef
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from streetvision import cli
from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, Params, ViewGrid
from streetvision.core.schema import CONDITIONS
from streetvision.data.store import open_split
from streetvision.data.views import ViewScores
from streetvision.fusion.fitting import LabelledViews
from streetvision.fusion.fusion import MODES
from streetvision.studies import decision, decision_held_out, decision_report
from streetvision.studies.data import WHOLE
from streetvision.studies.decision_held_out import fit_head, run_held_out
from streetvision.studies.decision_runs import (
    DEFAULT,
    METRICS,
    STEPS,
    Run,
    compare,
    decide,
    measured,
)
from streetvision.studies.runs import results_file
from streetvision.studies.variants import SIZES

QUICK = {
    "cvfm": {"fits": 2, "epochs": 3, "latent_dim": 4, "attention_dim": 8},
    "views": {"grid": 2},
    "evaluate": {"n_resamples": 200},
    "decision": {"n_resamples": 200},
}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_views_and_all_fusions(size: str) -> None:
    synthetic, photos = decision.studies(size, "all")
    assert (synthetic.data, photos.data) == ("synthetic", "photos")
    assert synthetic.folds == 0
    assert photos.folds == (3 if size == "smoke" else 10)
    for study in (synthetic, photos):
        assert study.recipe.views.grid > 1
        assert study.recipe.cvfm.mode == "auto"
    if size == "cpu":  # the presets as they are
        assert synthetic.recipe.train == Params().train
        assert synthetic.recipe.data == Params().data


def test_users_mistakes() -> None:
    with pytest.raises(UserError, match='--size "nope" is not one of smoke, cpu, large'):
        decision.studies("nope", "all")
    with pytest.raises(UserError, match='--data "nope" is not one of synthetic, photos, all'):
        decision.studies("smoke", "nope")


# --------------------------------------------------------------------------- the command


def command(scratch: Path, out: Path, *more: str) -> int:
    return cli.main(
        ["evidence", "decision", "--size", "smoke", "--data", "synthetic", "--workers", "1",
         "--seeds", "2", "--scratch", str(scratch), "--out", str(out), *more]
    )  # fmt: skip


def tables(text: str, head: str) -> Iterator[list[list[str]]]:
    """Cells of the tables whose first column is `head`."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            if rows[0][0] == head:
                yield rows[2:]
            rows = []


def test_command_resumes_and_its_tables_are_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "decision.md"
    assert command(scratch, out, "--list") == 0
    assert "synthetic: 0 of 2 splits" in capsys.readouterr().out
    assert not scratch.exists()

    plain, done = decision.run_split, []

    def interrupted(run: Run) -> dict[str, Any]:
        if done:
            raise KeyboardInterrupt
        done.append(run.number)
        return plain(run)

    monkeypatch.setattr(decision, "run_split", interrupted)
    assert command(scratch, out) == 130
    assert len(results_file(scratch).read_text().splitlines()) == 1
    assert not out.exists()
    with results_file(scratch).open("a") as file:
        file.write('{"key": "cut by a cr')

    monkeypatch.setattr(decision, "run_split", lambda run: done.append(run.number) or plain(run))
    assert command(scratch, out) == 0
    assert done == [0, 1]
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1]
    text = out.read_text()
    check_tables(text, lines)

    monkeypatch.setattr(decision, "run_split", lambda run: pytest.fail("done again"))
    assert command(scratch, out) == 0
    assert out.read_text() == text


def check_tables(text: str, lines: list[dict[str, Any]]) -> None:
    """Every cell from the lines, by hand."""
    means, seeds = list(tables(text, "step")), [t for t in tables(text, "seed") if len(t[0]) == 6]
    by_step = [t for t in seeds if t[0][1] == "single view"]
    assert len(means) == len(by_step) == len(CONDITIONS)
    seen = set()
    for condition, mean_rows, rows in zip(CONDITIONS, means, by_step, strict=True):
        for step, cells in zip(STEPS, mean_rows, strict=True):
            found = [line["conditions"][condition]["steps"][step] for line in lines]
            for metric, cell in zip(METRICS, cells[1:5], strict=True):
                values = [each[metric]["value"] for each in found]
                mean, deviation = statistics.mean(values), statistics.stdev(values)
                assert cell == f"{mean:.3f} ± {deviation:.3f}"
                seen.add(cell)
        for cells, (line, step) in zip(
            rows, ((line, step) for line in lines for step in STEPS), strict=True
        ):
            found = line["conditions"][condition]["steps"][step]
            assert cells[0] == str(line["number"])
            assert cells[2].split()[0] == f"{found['mcc']['value']:.3f}"
    assert len(seen) > 10, "the runs learnt nothing to tell apart"
    fusions = [t for t in seeds if t[0][1] in MODES]
    for condition, fusion in zip(CONDITIONS, fusions, strict=True):
        for cells, line in zip(fusion, lines, strict=True):
            found = line["conditions"][condition]["fusion"]
            assert cells[1] == found["mode"]
            assert cells[3].split()[0] == f"{found['gain_mcc']['value']:+.3f}"
            # Chosen in the condition that it is tested in.
            losses = {mode: row[condition]["log_loss"] for mode, row in found["modes"].items()}
            assert losses[found["mode"]] == min(losses.values())


# --------------------------------------------------------------------------- measures


def sample(n: int = 400, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Labels, groups, and the log-odds of a worse and a better model."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.7).astype(np.int64)
    signal = 2.0 * labels - 1
    return (
        labels, rng.integers(0, 20, n).astype(str), signal + rng.normal(0, 2, n),
        2 * signal + rng.normal(0, 2, n),
    )  # fmt: skip


def test_a_calibrated_model_gains_nothing_by_the_shift() -> None:
    """What is compared with the calibrated rule is moved to the served prior, too: steps and out of fold."""
    rng = np.random.default_rng(0)
    logits = rng.normal(1.5, 2, (2, 4000))
    labels = (rng.random((2, 4000)) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    groups = (np.arange(4000) // 40).astype(str)
    calib, test = (
        LabelledViews(ViewScores(z[:, None], None, np.ones((4000, 1)), np.zeros((4000, 1, 4))), y, groups)
        for z, y in zip(logits, labels, strict=True)
    )  # fmt: skip
    params = Params(**QUICK)  # type: ignore[arg-type]
    found = decide(logits[0], calib, logits[1], test, params)
    steps = found["steps"]
    for step in ("single", "fused"):
        assert steps[step]["log_loss"]["value"] == pytest.approx(
            steps["calibrated"]["log_loss"]["value"], abs=0.003
        )
    assert abs(found["out_of_fold"][DEFAULT]["gain_log_loss"]["value"]) < 0.003


def test_measures_against_scikit_learn() -> None:
    labels, groups, worse, better = sample()
    params = Params(**QUICK)  # type: ignore[arg-type]
    weights = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    found = compare(labels, groups, worse, better, params)
    for name, logits in (("before", worse), ("after", better)):
        mcc = matthews_corrcoef(labels, logits > 0, sample_weight=weights)
        loss = log_loss(labels, 1 / (1 + np.exp(-logits)), sample_weight=weights)
        assert found[name]["mcc"] == pytest.approx(mcc)
        assert found[name]["log_loss"] == pytest.approx(loss, rel=1e-5)
    gain = found["gain_mcc"]
    assert gain["value"] == pytest.approx(found["after"]["mcc"] - found["before"]["mcc"])
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    steps = measured(labels, 1 / (1 + np.exp(-better)), groups, params)
    assert steps["mcc"]["value"] == pytest.approx(found["after"]["mcc"])
    assert 0 < steps["noise_floor"] < steps["noise_floor_upper"]


def test_what_lowers_mcc_beyond_noise_is_counted() -> None:
    gains = [{"value": -0.1, "low": -0.2, "high": -0.01}, {"value": -0.1, "low": -0.2, "high": 0.1}]
    text = decision_report.verdict("A step", [*gains, {"value": 0.2, "low": None, "high": None}])
    assert text == "A step lowers MCC beyond noise in 1 of 3 runs (Δ +0.000 ± 0.173)."


# --------------------------------------------------------------------------- groups held out

D, VIEWS = 5, 5


@pytest.fixture
def held_out(write_split: Callable[..., Path], tmp_path: Path) -> Run:
    """A data set of 9 mixed groups whose evidence is in a tile, with its views already scored."""
    labels = [row % 2 for row in range(180)]
    path = write_split(tmp_path / "whole" / WHOLE, labels=labels, groups=9)
    split = open_split("crossval", "whole", path)
    params = Params(**QUICK)  # type: ignore[arg-type]
    run = Run("made-up", "held out of 3", 0, params, path.parent, tmp_path, tmp_path, "code")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(180, VIEWS, D))
    features[:, 2, 0] += 3 * split.labels
    features[:, 0, 1] += 0.7 * split.labels
    boxes = np.tile(
        np.array([[0, 0, 1, 1]] + [[0, 0, 0.5, 0.5 + 0.1 * k] for k in range(4)]), (180, 1, 1)
    )
    np.savez(
        decision_held_out._features_file(run), logits=np.zeros((180, VIEWS)),
        features=features.astype(np.float16), content=np.full((180, VIEWS), 100), boxes=boxes,
    )  # fmt: skip
    return run


def test_each_group_is_held_out_once_and_fusion_gains(held_out: Run) -> None:
    lines = [
        {"number": seed, "part": part} | run_held_out(replace(held_out, number=seed, part=part), 3)
        for seed in range(2)
        for part in range(3)
    ]
    groups = [set(line["groups"]) for line in lines[:3]]
    assert [len(each) for each in groups] == [3, 3, 3]
    assert len(set.union(*groups)) == 9
    text = decision_report.held_out_text(lines, seed=7)
    (rows,) = tables("\n".join(text), "fusion")
    labels = np.concatenate([line["labels"] for line in lines[:3]])
    for cells in rows:
        mode = cells[0].strip("*")
        logits = [
            np.concatenate([x["logits"][mode] for x in part]) for part in (lines[:3], lines[3:])
        ]
        scores = [matthews_corrcoef(labels, each > 0) for each in logits]
        assert cells[1] == f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}"
    assert lines[0]["logits"]["mlp"] != lines[3]["logits"]["mlp"], "VAL_SELECT was the same"
    gain = {cells[0].strip("*"): cells[4] for cells in rows}
    assert gain["single"] == ""
    assert float(gain["auto"].split()[0]) > 0.2
    assert float(gain["reference"].split()[0]) > 0.1
    for line in lines:
        losses = line["select_log_loss"]
        assert line["chosen"] == min(losses, key=lambda mode: losses[mode])
        assert line["logits"]["auto"] == line["logits"][line["chosen"]]
        assert sum(line["images"].values()) == 120


def test_labels_of_what_is_held_out_change_nothing(
    held_out: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_held_out(held_out, 3)
    real = open_split

    def mislabelled(*arguments: Any) -> Any:
        split = real(*arguments)
        labels = split.labels
        rows = np.isin(split.groups, list(set(before["groups"])))
        labels[rows] = 1 - labels[rows]
        monkeypatch.setattr(type(split), "labels", labels)
        return split

    monkeypatch.setattr(decision_held_out, "open_split", mislabelled)
    after = run_held_out(held_out, 3)
    assert after["labels"] == [1 - label for label in before["labels"]]
    assert after["logits"] == before["logits"]


def test_the_head_is_balanced_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (200, D)).astype(np.float32)
    y = (x[:, 0] + rng.normal(size=200) > 4).astype(np.int64)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced")).fit(x, y)
    found = decision_held_out._head_logits(fit_head(x, y), x)
    np.testing.assert_allclose(found, oracle.decision_function(x), atol=1e-3)


def test_too_few_groups(held_out: Run) -> None:
    with pytest.raises(UserError, match="10 parts need as many groups with both classes, not 9"):
        run_held_out(held_out, 10)


def test_keys_tell_runs_apart_and_ignore_the_machine(tmp_path: Path) -> None:
    run = Run("x", "split", 0, Params(), tmp_path / "a/0", tmp_path, tmp_path, "code")
    machine: Mapping[str, Any] = {"hardware": {"workers": 3}}
    assert replace(run, params=Params(**machine), code="other").key == run.key
    others = [
        replace(run, number=1), replace(run, kind="held out of 3"), replace(run, part=1),
        replace(run, source=tmp_path / "b/0"), replace(run, params=Params(cvfm=Cvfm(fits=2))),
        replace(run, params=Params(views=ViewGrid(grid=2))),
    ]  # fmt: skip
    assert len({run.key, *(other.key for other in others)}) == 7
