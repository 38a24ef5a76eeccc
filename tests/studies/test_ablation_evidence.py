"""The ladder: what is carried on, runs that resume, tables that are the runs' numbers, a sealed VAL_TEST."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t
from sklearn.metrics import log_loss, matthews_corrcoef

from streetvision import cli
from streetvision.core.errors import UserError
from streetvision.data.store import open_split
from streetvision.stats.bootstrap import Resting, spread
from streetvision.studies import ablation, ladder
from streetvision.studies.ablation import Candidate, Climb, climb, judge
from streetvision.studies.ablation_runs import BASES, CONDITIONS, FUSED, MOVED, VIEWS, Job, rule
from streetvision.studies.ablation_runs import _write as write_arrays
from streetvision.studies.data import rotate
from streetvision.studies.gains import Gain, Sample, crossed, paired_gain
from streetvision.studies.ladder import Ladder, Rung, ladders
from streetvision.studies.runs import append_line, results_file, whole_lines
from streetvision.studies.training import plan, prepare
from streetvision.studies.variants import SIZES

# --------------------------------------------------------------------------- plans


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_all_rungs(size: str) -> None:
    scenes, photos = ladders(size, "all")
    for each in (scenes, photos):
        assert [rung.name for rung in each.rungs] == ["ExPLoRA", "PEFT variant", "augmentation"]
        base = each.comparison.params(each.comparison.variants[0], 0)
        assert base.views.grid > 1
        assert base.cvfm.mode == "auto"
        assert not base.explora.enabled
        assert base.train.served_probability == 0
        for rung in each.rungs:
            found = [each.comparison.params(variant, 0) for variant in rung.variants]
            assert all(one != base for one in found)
    data = scenes.comparison.params(scenes.comparison.variants[0], 0).data
    assert data.fusion_fraction > 0
    assert min(data.val_calib_fraction, data.val_select_fraction) > 0.1
    assert photos.comparison.folds >= 5
    with pytest.raises(UserError, match="is not one of synthetic, photos, all"):
        ladders(size, "nope")


def test_the_pretrained_weights_are_those_of_the_training_evidence(tmp_path: Path) -> None:
    from streetvision.studies.variants import comparisons

    (scenes,) = ladders("smoke", "synthetic")
    before = plan(comparisons("smoke")[0], 1, tmp_path, tmp_path).pretraining
    after = plan(scenes.comparison, 1, tmp_path, tmp_path).pretraining
    assert before is not None
    assert after is not None
    assert after.weights == before.weights


def test_each_group_is_tested_chosen_and_calibrated_on_once(
    write_split: Callable[..., Path], tmp_path: Path
) -> None:
    labels = [row % 2 for row in range(110)] + [1, 1]  # the last group has one class
    path = write_split(tmp_path / "whole.arrow", len(labels), labels=labels, groups=56)
    whole = open_split("crossval", "whole", path)
    groups = np.array([f"g{row // 10}" for row in range(len(labels))])
    whole.groups = groups
    seen: dict[str, list[str]] = {"val_test": [], "val_select": [], "val_calib": []}
    for rows in rotate(whole, 5, calibrated=True):
        fusion = rows.pop("fusion")
        assert set(fusion) < set(rows["train"])
        assert sorted(np.concatenate(list(rows.values()))) == list(range(len(labels)))
        parts = [set(groups[each]) for each in rows.values()]
        assert sum(map(len, parts)) == len(set(groups))
        rest = np.setdiff1d(rows["train"], fusion)
        assert not set(groups[fusion]) & set(groups[rest])
        assert "g11" in groups[rest]
        for name, found in seen.items():
            found += set(groups[rows[name]])
    for found in seen.values():
        assert sorted(found) == sorted(f"g{k}" for k in range(11))
    with pytest.raises(UserError, match="4 folds, of at least 5"):
        rotate(whole, 4, calibrated=True)


# --------------------------------------------------------------------------- gains


def sample(n: int = 300, seeds: int = 3) -> tuple[Any, Any, list[Any], list[Any]]:
    rng = np.random.default_rng(1)
    labels = (rng.random(n) < 0.7).astype(np.int64)
    groups = rng.integers(0, 12, n)
    signal = 2.0 * labels - 1
    worse = [signal + rng.normal(0, 2, n) for _ in range(seeds)]
    return labels, groups, worse, [2 * each + rng.normal(0, 1, n) for each in worse]


def test_gains_against_scikit_learn_and_a_jackknife_by_hand() -> None:
    labels, groups, worse, better = sample()

    def score(metric: str, log_odds: Any, kept: Any) -> float:
        y = labels[kept]
        weights = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
        if metric == "mcc":
            return float(matthews_corrcoef(y, log_odds[kept] > 0, sample_weight=weights))
        return float(log_loss(y, 1 / (1 + np.exp(-log_odds[kept])), sample_weight=weights))

    samples = [
        Sample.pool([[(labels, groups, each)] for each in several], 0.5)
        for several in (worse, better)
    ]
    everything = np.ones(len(labels), dtype=bool)
    for metric in ("mcc", "log_loss"):
        assert samples[1].by_seed(metric) == pytest.approx(
            [score(metric, each, everything) for each in better]
        )
        pairs = list(zip(worse, better, strict=True))
        by_seed = [score(metric, b, everything) - score(metric, a, everything) for a, b in pairs]
        left_out = [
            np.mean(
                [score(metric, b, groups != g) - score(metric, a, groups != g) for a, b in pairs]
            )
            for g in sorted(range(12), key=str)  # as `Sample` has them
        ]
        jackknife = 11 / 12 * np.square(left_out - np.mean(left_out)).sum()
        of_groups, freedom = spread(np.array(left_out), samples[0].resting)
        assert of_groups**2 >= jackknife  # wider where the groups differ in size
        parts = of_groups**2, np.var(by_seed, ddof=1) / 3
        variance = sum(parts)
        freedoms = freedom, 2
        reach = np.hypot(
            *(t.ppf(0.975, df) * v**0.5 for df, v in zip(freedoms, parts, strict=True))
        )
        gain = paired_gain(*samples, metric)
        assert gain.value == pytest.approx(np.mean(by_seed))
        assert gain.error == pytest.approx(variance**0.5)
        assert gain.low is not None
        assert gain.high is not None
        assert gain.high - gain.value == pytest.approx(gain.value - gain.low)
        assert gain.high - gain.value == pytest.approx(reach)


def test_no_interval_below_five_groups() -> None:
    labels, groups, worse, better = sample()
    few = [Sample.pool([[(labels, groups % 4, x[0])]], 0.5) for x in (worse, better)]
    gain = paired_gain(few[0], few[1], "mcc")
    assert (gain.error, gain.low, gain.high) == (None, None, None)
    nothing = paired_gain(few[0], few[0], "mcc")
    assert nothing.value == 0


@pytest.mark.parametrize(("of_group", "of_seed"), [(1.0, 0.0), (1.0, 0.1), (1.0, 0.5), (0.3, 1.0)])
@pytest.mark.parametrize("groups", [10, 70])
def test_coverage_with_crossed_groups_and_seeds(
    groups: int, of_group: float, of_seed: float
) -> None:
    """Mean of group effects, seed effects and what both share; the truth is 0."""
    rng = np.random.default_rng(groups)
    inside, runs = 0, 1500
    for _ in range(runs):
        effects = rng.normal(0, of_group, groups) + rng.normal(0, of_seed, (3, 1))
        effects = effects + rng.normal(0, 0.3, (3, groups))  # [S, G]
        total = effects.sum(axis=1, keepdims=True)
        left_out = ((total - effects) / (groups - 1)).mean(axis=0)
        gain = crossed(effects.mean(axis=1), left_out, Resting.of(np.ones((groups, 1))))
        assert gain.low is not None
        assert gain.high is not None
        inside += gain.low <= 0 <= gain.high
    assert 0.94 <= inside / runs <= 0.99


# --------------------------------------------------------------------------- the choices


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny scenes and the weights that networks start from, made once; runs are each test's own."""
    folder = tmp_path_factory.mktemp("ladder")
    (each,) = ladders("smoke", "synthetic")
    prepare(plan(each.comparison, 2, folder, folder), folder, folder, 1)
    return folder


@pytest.fixture
def clean(scratch: Path) -> Iterator[Path]:
    """The same without the runs of another test."""
    results_file(scratch).unlink(missing_ok=True)
    yield scratch
    results_file(scratch).unlink(missing_ok=True)


Quality = Callable[[Job, str], float]


def pretend(quality: Quality) -> Callable[[Job], dict[str, Any]]:
    """A `finish` that trains nothing: log-odds that separate the classes by so much, plus fixed noise."""

    def finish(job: Job) -> dict[str, Any]:
        splits = {"val_select": "train", "val_test": "evaluate", "val_calib": "embed"}
        params = job.run.params
        rules = [
            rule(base, name, stage)
            for base in BASES
            for name in (params.decision.calibrator, "auto")
            for stage in ("calibrated", "deployed")
        ]
        for split, stage in splits.items():
            opened = job.run.fold.open(split, stage)
            rng = np.random.default_rng(job.run.seed)
            noise, sign = rng.normal(0, 1, len(opened)), 2 * opened.labels - 1
            names = {"val_select": ["served"], "val_test": list(CONDITIONS), "val_calib": []}
            if job.network is not None:
                moved = [f"{base}/{MOVED}" for base in BASES]
                names = {
                    "val_select": [f"{FUSED} served"],
                    "val_calib": [*moved, *rules],
                    "val_test": [f"{n} {c}" for n in (*BASES, *moved, *rules) for c in CONDITIONS],
                }
            write_arrays(
                job.scores(split), {n: noise + quality(job, n) * sign for n in names[split]}
            )
        job.model.mkdir(parents=True, exist_ok=True)
        line = {
            "key": job.key, "splits": list(splits), "seconds": 1.0, "comparison": "x", "mode": "mlp",
            "variant": job.run.variant, "seed": job.run.seed, "fold": 0, "code": "c", "views": 5,
            "moved": {"fused/platt": True, "fused/auto": False},
        }  # fmt: skip
        append_line(results_file(job.run.scratch), line)
        return line

    return finish


def climbed(scratch: Path, quality: Quality, monkeypatch: pytest.MonkeyPatch) -> Climb:
    monkeypatch.setattr(ablation, "finish", pretend(quality))
    (found,) = ablation.run_all(ladders("smoke", "synthetic"), 2, scratch, scratch, 1)
    return found


def test_a_rung_that_helps_is_carried_and_one_that_does_not_is_not(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, dict[str, Any]]] = []

    def quality(job: Job, name: str) -> float:
        train = job.run.params.train
        if job.network is None:
            trained.append((job.run.variant, train.model_dump()))
        value = 0.2 + 0.9 * (train.trainable == "lora") - 0.4 * job.run.params.explora.enabled
        value += 0.1 * (train.trainable == "last_n_blocks")
        value -= 0.6 * (train.served_probability > 0)
        return value + 2.0 * ("fused" in name) - 1.0 * ("calibrated" in name)

    found = climbed(clean, quality, monkeypatch)
    kept = {each.rung: each.kept for each in found.outcomes}
    assert kept == {
        "ExPLoRA": False, "PEFT variant": True, "augmentation": False, "fusion": True,
        "calibration": False, "deployed threshold": False,
    }  # fmt: skip
    assert found.outcomes[1].carried.name == "lora"
    # ExPLoRA is not below LoRA; LoRA is below the augmentation.
    after = [train for name, train in trained if name.startswith("challenge")]
    assert after
    assert all(each["trainable"] == "lora" for each in after)
    views = found.outcomes[3].candidates[0].jobs
    assert {job.network.run.variant for job in views if job.network} == {"lora"}
    assert found.outcomes[-1].carried.names["val_test"] == f"{FUSED}/{MOVED}"
    # A rerun finds everything done.
    monkeypatch.setattr(ablation, "finish", lambda job: pytest.fail("done again"))
    ablation.run_all(ladders("smoke", "synthetic"), 2, clean, clean, 1)


def test_choices_do_not_open_val_test(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Job.read

    def sealed(job: Job, split: str) -> Any:
        assert split != "val_test"
        return plain(job, split)

    monkeypatch.setattr(Job, "read", sealed)
    found = climbed(clean, lambda job, name: 1.0, monkeypatch)
    # Nothing changes anything, so nothing is carried on.
    assert not any(each.kept for each in found.outcomes)
    assert all(each.gains[0] == Gain(0.0, 0.0, 0.0, 0.0) for each in found.outcomes)


def test_a_failed_variant_is_not_chosen(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = climbed(clean, lambda job, name: 1.0, monkeypatch)
    candidate = found.outcomes[1].candidates[0]
    lines = whole_lines(results_file(clean))
    broken = {**lines, candidate.jobs[0].key: {"error": "diverged"}}
    outcome = judge("x", "val_select", "mcc", found.baseline, (candidate,), broken)
    assert (outcome.best, outcome.kept, outcome.carried) == (None, False, found.baseline)


def test_only_folds_that_all_seeds_have_are_judged(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = climbed(clean, lambda job, name: 1.0, monkeypatch)
    calibration = found.outcomes[4]
    job, split = calibration.candidates[0].jobs[1], "val_calib"
    write_arrays(job.scores(split), {n: v for n, v in job.read(split).items() if "/" not in n})
    lines = whole_lines(results_file(clean))
    again = judge("x", split, "log_loss", calibration.before, calibration.candidates, lines)
    assert again.gains == (None, None)
    assert not again.kept


def test_keys_tell_jobs_apart(clean: Path) -> None:
    (each,) = ladders("smoke", "synthetic")
    seen = climb(each, 2, clean, clean, {})
    one, other = seen.baseline.jobs
    assert seen.missing == seen.baseline.jobs
    params = one.run.params
    changed = [
        replace(one.run, params=params.model_copy(update={"embed": params.embed.model_copy(
            update={"served_repeats": 3})})),
        replace(one.run, params=params.model_copy(update={"train": params.train.model_copy(
            update={"epochs": 9})})),
    ]  # fmt: skip
    grid = params.model_copy(update={"views": params.views.model_copy(update={"grid": 4})})
    views = Job(replace(one.run, variant=VIEWS), one)
    keys = {
        one.key, other.key, *(Job(run).key for run in changed), views.key,
        Job(replace(views.run, params=grid), one).key, Job(views.run, other).key,
    }  # fmt: skip
    assert len(keys) == 7
    assert Job(replace(one.run, params=grid)).key == one.key  # a network has one view


# --------------------------------------------------------------------------- the command


def tables(text: str, head: str) -> list[list[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split(head)[1].split("\n\n")[1].splitlines()
    ]
    return [rows[0], *rows[2:]]


def test_command_resumes_and_its_tables_are_the_runs(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(size: str, data: str) -> list[Ladder]:
        (each,) = ladders(size, data)
        rungs = (each.rungs[0], Rung("PEFT variant", each.rungs[1].variants[:1]))
        return [replace(each, rungs=rungs)]

    monkeypatch.setattr(ladder, "ladders", short)
    out = tmp_path / "ablation.md"
    arguments = [
        "evidence", "ablation", "--size", "smoke", "--data", "synthetic", "--workers", "1",
        "--seeds", "2", "--scratch", str(clean), "--out", str(out),
    ]  # fmt: skip
    assert cli.main([*arguments, "--list"]) == 0
    listed = capsys.readouterr().out
    assert "baseline             0 of 2 runs" in listed
    assert "views                0 of 2 runs" in listed

    plain, done = ablation.finish, []

    def interrupted(job: Job) -> dict[str, Any]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job.key)
        return plain(job)

    monkeypatch.setattr(ablation, "finish", interrupted)
    assert cli.main(arguments) == 130
    assert not out.exists()
    monkeypatch.setattr(ablation, "finish", lambda job: done.append(job.key) or plain(job))
    assert cli.main(arguments) == 0
    assert len(done) == len(set(done)) == 8
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == done
    assert not any("error" in line for line in lines)

    text = out.read_text()
    (found,) = ablation.run_all(short("smoke", "synthetic"), 2, clean, clean, 1)
    rows = tables(text, "VAL_TEST:")
    names = ["baseline", *(f"+ {each.rung}" for each in found.outcomes)]
    assert [row[0].split(":")[0] for row in rows[1:8]][: len(names)] == names
    best = [each.candidates[each.best] for each in found.outcomes if each.best is not None]
    for row, candidate in zip(rows[1:], [found.baseline, *best], strict=False):
        check_row(row, candidate)
    gains = [gain for each in found.outcomes for gain in each.gains]
    for row, gain in zip(tables(text, "Choices:")[1:], gains, strict=True):
        assert row[5].startswith("not judged" if gain is None else f"{gain.value:+.3f}")

    monkeypatch.setattr(ablation, "finish", lambda job: pytest.fail("done again"))
    assert cli.main(arguments) == 0
    assert out.read_text() == text


def check_row(row: list[str], candidate: Candidate) -> None:
    """Means over the seeds, from the stored log-odds by scikit-learn."""
    for cell, condition in ((row[1], "clean"), (row[3], "served")):
        found = []
        for job in candidate.jobs:
            labels = job.run.fold.read("val_test").labels
            weights = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
            name = f"{candidate.names['val_test']} {condition}".strip()
            decided = job.read("val_test")[name] > 0
            found.append(matthews_corrcoef(labels, decided, sample_weight=weights))
        assert cell == f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}"
