"""Each gate at, above and below its limit; then `gate` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from streetvision.core.errors import UserError
from streetvision.core.params import Gates
from streetvision.evaluation.predictions import Predictions
from streetvision.review.compare import compare_predictions
from streetvision.review.gates import GateResult, judge, overall, read_timing
from streetvision.review.revisions import Review, Revision
from streetvision.stats.bootstrap import Interval, group_intervals
from streetvision.stats.paired import groups_needed
from tests.benchmarks.comparison import BETTER, simulate
from tests.pipeline.project import Project

Run = Callable[..., tuple[int, str, str]]
OFF = dict.fromkeys(Gates.model_fields, None)


@pytest.fixture
def found(tmp_path: Path) -> Review:
    """Head is worse: MCC by 0.07, on 30 groups."""
    labels, head, base, groups = simulate(BETTER, 30, np.random.default_rng(0))
    ids = np.arange(len(labels)).astype(str)
    sides = [Predictions(ids, groups.astype(str), labels, p) for p in (base, head)]
    comparison = compare_predictions(*sides, 0.5, n_resamples=200)
    revisions = Revision(tmp_path, "base"), Revision(tmp_path, None)
    return Review(*revisions, comparison, None, ())


def with_interval(found: Review, metric: str, part: str, interval: Interval) -> Review:
    """The same review with another interval of one metric."""
    differences = found.comparison.differences
    changed = replace(differences[metric], **{part: interval})
    comparison = replace(found.comparison, differences=differences | {metric: changed})
    return replace(found, comparison=comparison)


def only(found: Review, timings: Any = None, **gates: float) -> GateResult:
    [result] = judge(Gates(**(OFF | gates)), found, timings)
    return result


DROPS = [
    # value, low, high of head minus base → outcome at a limit of 0.02
    ((0.01, 0.0, 0.02), "pass"),
    ((-0.01, -0.02, 0.0), "pass"),
    ((-0.01, -0.0201, 0.0), "inconclusive"),
    ((-0.05, -0.08, -0.02), "inconclusive"),
    ((-0.05, -0.08, -0.0201), "fail"),
]


@pytest.mark.parametrize(("values", "outcome"), DROPS)
@pytest.mark.parametrize("metric", ["mcc", "accuracy"])
def test_a_drop_is_judged_on_the_interval(
    found: Review, metric: str, values: tuple[float, float, float], outcome: str
) -> None:
    changed = with_interval(found, metric, "delta", Interval(*values, "x"))
    result = only(changed, **{f"max_{metric}_drop": 0.02})
    assert (result.name, result.limit, result.outcome) == (f"max_{metric}_drop", 0.02, outcome)
    assert f"difference {values[0]:+.4f} [{values[1]:+.4f}, {values[2]:+.4f}]" in result.reason
    assert ("would decide" in result.reason) == (outcome == "inconclusive")


def test_an_inconclusive_gate_names_the_size_that_decides(found: Review) -> None:
    n, n_groups = found.comparison.n, found.comparison.n_groups
    changed = with_interval(found, "mcc", "delta", Interval(-0.01, -0.05, 0.03, "x"))
    groups = groups_needed(0.01, 0.08 / 2 / 1.959964, n_groups)
    assert groups is not None
    images = int(np.ceil(groups * n / n_groups))
    wanted = f"about {images:,} test images in {groups:,} groups would decide, here are {n:,} in {n_groups:,}"
    assert wanted in only(changed, max_mcc_drop=0.02).reason
    at_limit = with_interval(found, "mcc", "delta", Interval(-0.02, -0.05, 0.03, "x"))
    result = only(at_limit, max_mcc_drop=0.02)
    assert (result.outcome, "no test size would decide" in result.reason) == ("inconclusive", True)


def test_without_an_interval_nothing_passes_but_equal_decisions(found: Review) -> None:
    none = with_interval(found, "mcc", "delta", Interval(0.0, None, None, "none: too few"))
    result = only(none, max_mcc_drop=0.02)
    assert result.outcome == "inconclusive"
    assert "no interval (none: too few)" in result.reason
    same = replace(none, comparison=replace(none.comparison, changes=()))
    assert only(same, max_mcc_drop=0.0) == GateResult(
        "max_mcc_drop", 0.0, "pass", "no decision changed"
    )


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [(0.05, "pass"), (0.0499, "inconclusive"), (0.01, "inconclusive"), (0.0099, "fail")],
)
def test_ece_is_judged_on_heads_interval(found: Review, limit: float, outcome: str) -> None:
    changed = with_interval(found, "ece_debiased", "head", Interval(0.03, 0.01, 0.05, "x", 7.25))
    result = only(changed, max_ece=limit)
    assert result.outcome == outcome
    seen = "debiased ECE 0.0300 [0.0100, 0.0500] over 7.2 effective groups"
    assert result.reason.startswith(seen)
    assert ("would decide" in result.reason) == (outcome == "inconclusive")
    none = with_interval(found, "ece_debiased", "head", Interval(0.0, None, None, "none: why"))
    assert only(none, max_ece=limit).outcome == "inconclusive"


def calibrated(n: int, rng: np.random.Generator) -> Interval:
    """The debiased ECE that a perfectly calibrated model shows on n independent images."""
    logits = rng.normal(0, 2, n)
    p = 1 / (1 + np.exp(-logits))
    labels = (rng.random(n) < p).astype(int)
    return group_intervals(labels, p, np.arange(n), 0.5, metrics=["ece_debiased"])["ece_debiased"]


def test_a_calibrated_model_does_not_fail_and_the_size_that_decides_does(found: Review) -> None:
    """On 200 images; then on as many as the median gate named, most pass."""
    rng = np.random.default_rng(0)

    def judged(n: int, times: int) -> list[GateResult]:
        sized = replace(found, comparison=replace(found.comparison, n=n, n_groups=n))
        return [
            only(with_interval(sized, "ece_debiased", "head", calibrated(n, rng)), max_ece=0.05)
            for _ in range(times)
        ]

    small = judged(200, 300)
    assert sum(each.outcome == "fail" for each in small) == 0
    named = [
        int(each.reason.partition("about ")[2].partition(" ")[0].replace(",", ""))
        for each in small
        if each.outcome == "inconclusive"
    ]
    assert len(named) > 250
    needed = int(np.median(named))
    assert 500 < needed < 4000
    passed = np.mean([each.outcome == "pass" for each in judged(needed, 60)])
    assert 0.6 <= passed <= 1


def test_gates_that_are_off_are_not_judged(found: Review) -> None:
    assert judge(Gates(**OFF), found, None) == []
    names = [result.name for result in judge(Gates(), found, None)]
    assert names == ["max_mcc_drop", "max_ece"]


def timing(folder: Path, name: str, **engines: float) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({engine: {"p95_ms": value} for engine, value in engines.items()}))
    return path


def test_latency_is_that_of_the_engine_that_grew_most(found: Review, tmp_path: Path) -> None:
    base = read_timing(timing(tmp_path, "base", torch=10.0, onnx=5.0, old=1.0))
    head = read_timing(timing(tmp_path, "head", torch=10.5, onnx=6.0, new=9.0))
    result = only(found, (base, head), max_latency_growth=0.1)
    assert result.outcome == "fail"
    assert result.reason == "p95 of onnx 5.0 → 6.0 ms (+20.0%); a point"
    assert only(found, (base, head), max_latency_growth=0.2001).outcome == "pass"
    for timings, said in (
        (None, "--timing takes base's and head's"),
        ((base, {"other": {"p95_ms": 1.0}}), "no engine in common"),
    ):
        result = only(found, timings, max_latency_growth=0.1)
        assert result.outcome == "inconclusive"
        assert result.reason.startswith("not measured: ")
        assert said in result.reason


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"torch": {}}', '{"torch": {"p95_ms": 0}}', '{"a": 1}']
)
def test_a_broken_timing_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "timing.json"
    path.write_text(text)
    with pytest.raises(UserError, match="timing"):
        read_timing(path)
    with pytest.raises(UserError, match="cannot read the timing"):
        read_timing(tmp_path / "missing.json")


def test_one_failure_fails_and_one_doubt_is_a_doubt() -> None:
    def outcome(*outcomes: Any) -> str:
        return overall([GateResult("x", 0.1, each, "") for each in outcomes])

    assert outcome() == outcome("pass", "pass") == "pass"
    assert outcome("pass", "inconclusive") == "inconclusive"
    assert outcome("inconclusive", "fail", "pass") == "fail"


# --------------------------------------------------------------------------- the command


def set_gates(project: Project, **gates: float | None) -> None:
    project.change({"gates": OFF | gates})


def test_a_model_that_lost_fails(compared: Project, run: Run) -> None:
    set_gates(compared, max_mcc_drop=0.0001)
    code, shown, _ = run("gate", "better", "main")
    assert code == 1
    assert "main against better: fail" in shown
    assert "Off: max_accuracy_drop, max_ece, min_reward, max_latency_growth." in shown
    # The other way round it is a gain.
    code, shown, _ = run("gate", "main", "better")
    assert code == 0
    assert "better against main: pass" in shown


@pytest.mark.parametrize(("choice", "code"), [("fail", 1), ("pass", 0)])
def test_the_exit_code_of_a_doubt_is_a_choice(
    compared: Project, run: Run, choice: str, code: int
) -> None:
    set_gates(compared, max_latency_growth=0.1)
    found, shown, _ = run("gate", "main", "better", "--inconclusive", choice)
    assert found == code
    assert "not measured" in shown
    assert "better against main: inconclusive" in shown
    assert run("gate", "main", "better")[0] == 1


def test_latency_is_read_from_the_two_files(compared: Project, run: Run, tmp_path: Path) -> None:
    set_gates(compared, max_latency_growth=0.1)
    base, head = timing(tmp_path, "base", torch=10.0), timing(tmp_path, "head", torch=12.0)
    assert run("gate", "main", "better", "--timing", str(base), str(head))[0] == 1
    assert run("gate", "main", "better", "--timing", str(head), str(base))[0] == 0


def test_the_reward_is_that_of_heads_challenge(compared: Project, run: Run) -> None:
    set_gates(compared, min_reward=0.4)
    code, shown, _ = run("gate", "main")
    assert code == 1
    assert "not measured: metrics/challenge.json of working tree is missing" in shown
    path = compared / "metrics/challenge.json"
    for mean, low, high, outcome in ((0.5, 0.4, 0.6, "pass"), (0.45, 0.3, 0.6, "inconclusive"),
                                     (0.3, 0.2, 0.39, "fail")):  # fmt: skip
        reward = {"mean": mean, "low": low, "high": high}
        path.write_text(
            json.dumps({"reward": reward, "interval_method": "x", "n": 100, "n_groups": 20})
        )
        code, shown, _ = run("gate", "main", "--inconclusive", "pass")
        assert code == (outcome == "fail")
        assert f"working tree against main: {outcome}" in shown
    path.write_text("{}")
    code, _, said = run("gate", "main")
    assert code == 2
    assert "metrics/challenge.json of working tree is not what `challenge` writes" in said


def locked_stage(project: Project, name: str) -> None:
    """`main` gets a stage whose code is `name` and whose results are the predictions, as if it had run."""
    (project / name).write_text("first\n")
    stage = {
        "cmd": "true",
        "deps": [name],
        "metrics": [{"metrics/evaluation.json": {"cache": False}}],
    }
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))
    project.dvc("commit", "--quiet", "--force")
    project.commit()


def test_stale_results_are_refused(compared: Project, run: Run) -> None:
    """Code that was changed, committed and not run: in the working tree and of a revision."""
    set_gates(compared)
    locked_stage(compared, "score.py")
    assert run("gate", "main")[:2] == (
        0,
        run("gate", "main", "HEAD")[1].replace("HEAD", "working tree"),
    )
    compared.git("checkout", "--quiet", "-b", "change")
    (compared / "score.py").write_text("second\n")
    for commit in (False, True):
        if commit:
            compared.commit()
        heads = [(), ("change",)] if commit else [()]
        for head in heads:
            for choice in ("fail", "pass"):
                code, shown, said = run("gate", "main", *head, "--inconclusive", choice)
                name = head[0] if head else "working tree"
                assert (code, said) == (1, "")
                first, last = shown.splitlines()
                assert first == f"stale in {name}: evaluate: score.py changed"
                assert last.startswith(
                    f"{name} against main: fail, its results are stale; `dvc repro`"
                )
    code, shown, _ = run("compare", "main", "change")
    assert code == 0
    assert shown.split("\n\n")[2] == "Note: stale in change: evaluate: score.py changed."
    # Base is stale: doubt, unless the user says that doubts pass.
    code, shown, _ = run("gate", "change", "main")
    assert code == 1
    assert "Note: stale in change: evaluate: score.py changed." in shown
    assert "main against change: inconclusive" in shown
    assert run("gate", "change", "main", "--inconclusive", "pass")[0] == 0
    # A metric that was edited, or merged, is nobody's result.
    compared.git("checkout", "--quiet", "main")
    (compared / "metrics/evaluation.json").write_text("{}")
    code, shown, _ = run("gate", "main")
    assert code == 1
    assert "stale in working tree: evaluate: metrics/evaluation.json is not what it wrote" in shown


def test_loosened_gates_are_named(compared: Project, run: Run) -> None:
    was = yaml.safe_load(compared.git("show", "main:params.yaml").stdout)["gates"]["max_mcc_drop"]
    set_gates(compared, max_mcc_drop=1.0)
    code, shown, _ = run("gate", "main", "better")
    assert code == 0
    assert f"Note: max_mcc_drop was {was:g} in main." in shown
