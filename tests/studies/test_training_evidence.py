"""The evidence command: valid variants, resumption, tables that are the runs' numbers, a sealed VAL_TEST."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

from streetvision import cli
from streetvision.core.errors import UserError
from streetvision.core.params import Params
from streetvision.data.store import open_split
from streetvision.studies import report, runs, training
from streetvision.studies.data import Fold, prepare_folds, rotate
from streetvision.studies.report import Table, pooled_mcc
from streetvision.studies.runs import Run, Scores, append_line, read_lines, results_file
from streetvision.studies.variants import (
    BASELINE,
    SIZES,
    Comparison,
    Variant,
    comparisons,
    every_run,
    named,
)


@pytest.mark.parametrize("size", SIZES)
def test_each_variant_is_valid_and_differs(size: str) -> None:
    for comparison in comparisons(size):
        names = [variant.name for variant in comparison.variants]
        assert names[0] == BASELINE
        assert len(names) == len(set(names))
        found = {
            name: comparison.params(v, 0)
            for name, v in zip(names, comparison.variants, strict=True)
        }
        assert len({params.model_dump_json() for params in found.values()}) == len(names)
        assert {variant.against for variant in comparison.variants} <= set(names)
        # No epoch may be chosen on the split that variants are compared on.
        assert {params.train.choose_epoch for params in found.values()} == {"last"}
        assert all(
            not params.explora.enabled for name, params in found.items() if "explora" not in name
        )


def test_adapters_start_from_pretrained_weights() -> None:
    for comparison in comparisons("cpu"):
        for variant in comparison.variants:
            params = comparison.params(variant, 0)
            if params.train.trainable in {"lora", "dora", "head", "last_n_blocks"}:
                assert comparison.pretraining is not None or params.train.weights != "none"


def test_choosing_what_to_run() -> None:
    found = named(comparisons("cpu"), "synthetic", ["lora_pissa", "focal"])
    assert [[v.name for v in c.variants] for c in found] == [
        ["baseline", "focal"],
        ["baseline", "lora", "lora_pissa"],  # with what it is compared against
    ]
    with pytest.raises(UserError, match='"focall" is not one of '):
        named(comparisons("cpu"), "all", ["focall"])
    with pytest.raises(UserError, match='--data "nope" is not one of synthetic, photos, all'):
        named(comparisons("cpu"), "nope", None)
    with pytest.raises(UserError, match='--size "nope"'):
        comparisons("nope")


def test_rotation_reads_each_mixed_group_once(
    write_split: Callable[..., Path], tmp_path: Path
) -> None:
    # Images come in pairs of a group, so the last of 9 groups is made one of a class.
    labels = [0 if row // 2 % 9 == 8 else row % 2 for row in range(90)]
    path = write_split(tmp_path / "whole.arrow", labels=labels, groups=9)
    whole = open_split("crossval", "whole", path)
    seen: dict[str, list[str]] = {"val_select": [], "val_test": []}
    for rows in rotate(whole, 4):
        groups = {name: set(whole.groups[chosen]) for name, chosen in rows.items()}
        assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(90))
        assert not groups["train"] & (groups["val_select"] | groups["val_test"])
        assert not groups["val_select"] & groups["val_test"]
        assert "whole-g8" in groups["train"]
        for name, names in seen.items():
            names.extend(sorted(groups[name]))
    for found in seen.values():
        assert sorted(found) == [f"whole-g{number}" for number in range(8)]
    with pytest.raises(UserError, match="there are 8"):
        rotate(whole, 9)


# --------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that data and pretrained weights are made once."""
    return tmp_path_factory.mktemp("evidence")


def command(scratch: Path, out: Path, *more: str) -> int:
    return cli.main(
        ["evidence", "training", "--size", "smoke", "--data", "synthetic", "--workers", "1",
         "--seeds", "1", "--variants", "label_smoothing,head", "--scratch", str(scratch),
         "--out", str(out), *more]
    )  # fmt: skip


def rows_of(text: str, columns: int) -> Iterator[list[str]]:
    """Cells of the rows of all tables with so many columns, heads left out."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == columns and cells[0] not in {"variant", "chosen by"}:
            yield cells


def mcc_by_hand(line: dict[str, Any], challenge: bool) -> float:
    """From lists of labels and decisions."""
    labels: list[int] = []
    decisions: list[int] = []
    for c in line["levels"] if challenge else [line["clean"]]:
        for name, label, decision in (("tp", 1, 1), ("fp", 0, 1), ("tn", 0, 0), ("fn", 1, 0)):
            labels += [label] * c[name]
            decisions += [decision] * c[name]
    return float(matthews_corrcoef(labels, decisions))


def test_command_resumes_and_its_tables_are_the_lines(
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "training.md"
    assert command(scratch, out, "--list") == 0
    shown = capsys.readouterr().out
    assert "label_smoothing      0 of 1 runs  train.label_smoothing = 0.1" in shown
    assert "left: about" in shown
    assert not results_file(scratch).exists()

    trained: list[int] = []
    plain = runs.run_variant

    def counted(*arguments: Any) -> runs.Outcome:
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(1)
        return plain(*arguments)

    monkeypatch.setattr(runs, "run_variant", counted)
    assert command(scratch, out) == 130
    assert len(results_file(scratch).read_text().splitlines()) == 1
    assert not out.exists()

    # A line that a crash cut is not a run.
    with results_file(scratch).open("a") as file:
        file.write('{"key": "12')
    monkeypatch.setattr(runs, "run_variant", lambda *a: trained.append(1) or plain(*a))
    opened: list[str] = []
    unseal = report.unseal
    monkeypatch.setattr(report, "unseal", lambda run: opened.append(run.key) or unseal(run))
    assert command(scratch, out) == 0
    assert len(trained) == 4  # baseline and label_smoothing; baseline and head

    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert len({line["mcc"] for line in lines}) > 1
    text = out.read_text()
    table = list(rows_of(text, len(report.COLUMNS)))
    assert len(table) == 4
    for cells, line in zip(table, lines, strict=True):
        name = cells[0].split()[0].strip("*")
        assert name == line["variant"]
        base = next(
            x for x in lines if (x["comparison"], x["variant"]) == (line["comparison"], BASELINE)
        )
        assert float(cells[2]) == pytest.approx(mcc_by_hand(line, challenge=False), abs=6e-4)
        assert float(cells[4]) == pytest.approx(mcc_by_hand(line, challenge=True), abs=6e-4)
        if name != BASELINE:
            gain = mcc_by_hand(line, challenge=False) - mcc_by_hand(base, challenge=False)
            assert float(cells[3]) == pytest.approx(gain, abs=6e-4)
        assert float(cells[7]) == pytest.approx(line["log_loss"], abs=6e-4)
    check_test_table(text, lines, scratch)
    # VAL_TEST was opened for nothing but the baselines and what was chosen.
    chosen = {BASELINE, *(cells[1] for cells in rows_of(text, 5))}
    assert {x["variant"] for x in lines if x["key"] in opened} == chosen

    def refuse(*_: Any) -> runs.Outcome:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "run_variant", refuse)
    assert command(scratch, out) == 0
    assert out.read_text() == text


def check_test_table(text: str, lines: list[dict[str, Any]], scratch: Path) -> None:
    """VAL_TEST's numbers follow from the sealed scores and the labels."""
    found = list(rows_of(text, 5))
    assert len(found) == 4  # two criteria in two comparisons
    for number, cells in enumerate(found):
        comparison = ("synthetic-resnet", "synthetic-xcit")[number // 2]
        kind = ("clean", "levels")[number % 2]
        run = next(x for x in lines if (x["comparison"], x["variant"]) == (comparison, cells[1]))
        with np.load(scratch / "sealed" / f"{run['key']}.npz") as stored:
            scores = np.atleast_2d(stored[kind])
        plan = training.plan(comparisons("smoke")[number // 2], 1, scratch, scratch)
        labels = plan.folds[0].read("val_test").labels
        wanted = matthews_corrcoef(np.tile(labels, len(scores)), scores.ravel() > 0.5)
        assert float(cells[3].split()[0]) == pytest.approx(wanted, abs=6e-4)


def test_a_users_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(tmp_path, tmp_path / "x.md", "--seeds", "0") == 2
    assert "--seeds must be at least 1" in capsys.readouterr().err


# --------------------------------------------------------------------------- lines to tables


def run_of(variant: str, seed: int, fold: int, scratch: Path) -> Run:
    return Run(
        "made-up", variant, seed, fold, Fold(scratch / "data" / str(fold)), Params(seed=seed),
        scratch, scratch, "code",
    )  # fmt: skip


def made_up(
    scratch: Path, right: dict[str, list[list[int]]], images: int = 40
) -> tuple[Comparison, list[Run]]:
    """Lines of runs with `right[variant][seed][fold]` right decisions of `images`."""
    variants = tuple(Variant(name, "", {"train": {"epochs": n}}) for n, name in enumerate(right, 1))
    folds = len(next(iter(right.values()))[0])
    comparison = Comparison("made-up", "synthetic", "Made up", {}, variants, folds)
    made = []
    for variant, seed, fold in every_run(comparison, len(next(iter(right.values())))):
        run = run_of(variant.name, seed, fold, scratch)
        good = right[variant.name][seed][fold]
        half, rest = good // 2, images // 2
        counts = {"tp": half, "fn": rest - half, "tn": good - half, "fp": rest - good + half}
        append_line(
            results_file(scratch),
            {"key": run.key, "comparison": "made-up", "variant": variant.name, "seed": seed,
             "fold": fold, "code": "code", "clean": counts, "levels": [counts] * 4, "images": images,
             "log_loss": 0.5, "roc_auc": 0.5, "seconds": 2.0, "trainable_parameters": 3},
        )  # fmt: skip
        run.sealed.parent.mkdir(parents=True, exist_ok=True)
        run.sealed.touch()
        made.append(run)
    return comparison, made


def test_spread_gain_and_choice(tmp_path: Path) -> None:
    right = {
        BASELINE: [[30, 30], [32, 28]],
        "better": [[36, 28], [36, 30]],
        "equal": [[30, 30], [32, 28]],
    }
    comparison, made = made_up(tmp_path, right)
    table = Table(comparison, made, read_lines(results_file(tmp_path), made))
    assert table.chosen("clean") == ["better", BASELINE]  # of equals the first
    assert table.best("clean") == "better"
    # MCC of balanced decisions with a equal share right in both classes is 2 · accuracy − 1.
    assert table.mcc("better", "clean") == pytest.approx([2 * 64 / 80 - 1, 2 * 66 / 80 - 1])
    _, _, baseline, better, _ = report.variants_table(table)
    cells = [cell.strip() for cell in better.split("|")]
    assert cells[1] == "**better** (best on clean, best on served)"
    assert cells[3] == "0.625 ± 0.035"
    assert cells[4] == "+0.125 ± 0.035"
    assert baseline.split("|")[4].strip() == ""


def test_unfinished_and_failed_variants_are_shown_and_never_chosen(tmp_path: Path) -> None:
    comparison, made = made_up(tmp_path, {BASELINE: [[25]], "open": [[40]], "broken": [[40]]})
    lines = read_lines(results_file(tmp_path), made)
    del lines[made[1].key]
    lines[made[2].key] = {"error": "training diverged", "seed": 0}
    table = Table(comparison, made, lines)
    assert table.chosen("clean") == [BASELINE]
    text = report.variants_table(table)
    assert "| 0 of 1 runs |" in text[3]
    assert "| failed: training diverged |" in text[4]


def test_a_run_without_its_sealed_scores_is_done_again(tmp_path: Path) -> None:
    _, made = made_up(tmp_path, {BASELINE: [[25]], "other": [[25]]})
    made[0].sealed.unlink()
    assert set(read_lines(results_file(tmp_path), made)) == {made[1].key}


def test_a_variant_that_cannot_be_trained_leaves_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any) -> runs.Outcome:
        raise UserError("training\ndiverged")

    monkeypatch.setattr(runs, "run_variant", diverge)
    run = run_of("baseline", 0, 0, tmp_path)
    runs.finish(run)
    assert read_lines(results_file(tmp_path), [run])[run.key]["error"] == "training diverged"


def test_pooled_decisions_over_folds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (3, 50))
    clean = rng.random((3, 50))
    levels = rng.random((3, 4, 50))
    lines = [runs.record(labels[fold], Scores(clean[fold], levels[fold])) for fold in range(3)]
    assert pooled_mcc(lines, "clean") == pytest.approx(
        matthews_corrcoef(labels.ravel(), clean.ravel() > 0.5)
    )
    assert pooled_mcc(lines, "served") == pytest.approx(
        matthews_corrcoef(np.repeat(labels, 4, axis=0).ravel(), levels.ravel() > 0.5)
    )


def test_keys_tell_runs_apart_and_ignore_the_machine(tmp_path: Path) -> None:
    run = run_of("x", 0, 0, tmp_path)
    hardware = Params(seed=0, hardware={"workers": 3})  # type: ignore[arg-type]
    from dataclasses import replace

    assert replace(run, params=hardware, code="other", root=Path("/x")).key == run.key
    others = [
        run_of("y", 0, 0, tmp_path), run_of("x", 1, 0, tmp_path), run_of("x", 0, 1, tmp_path),
        replace(run, params=Params(seed=0, train={"epochs": 3})),  # type: ignore[arg-type]
    ]  # fmt: skip
    assert len({run.key, *(other.key for other in others)}) == 5


def test_photos_are_prepared_in_folds(repository: Path, tmp_path: Path) -> None:
    if not (repository / "../shared/photos").is_dir():
        pytest.skip("no photographs here")
    (comparison,) = named(comparisons("smoke"), "photos", [BASELINE])
    plan = training.plan(comparison, 1, repository, tmp_path)
    prepare_folds(plan.folds, plan.runs[0].params.data, repository, 1)
    for fold in plan.folds:
        assert len(fold.open("train", "train")) + sum(
            len(fold.read(name)) for name in ("val_select", "val_test")
        ) == 686  # fmt: skip
