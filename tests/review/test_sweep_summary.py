"""Sweeps: aggregation over seeds, the optimism of the maximum against simulation, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streetvision.core.artifacts import json_text
from streetvision.core.errors import UserError
from streetvision.review.experiments import TEST_METRICS, Run
from streetvision.review.review_plots import plot_parallel_coordinates
from streetvision.review.sweep_summary import (
    CHOOSE_BY,
    REPORTED,
    SPLIT_SEED,
    Summary,
    columns,
    document,
    optimism_of_the_maximum,
    render,
    summarise,
)
from tests.pipeline.project import REPOSITORY, outputs, read_dvc_yaml

LOSS = "metrics/calibrate.json:after.served.log_loss"
GAIN = "metrics/cvfm.json:gain.log_loss"


def run(name: str, metrics: Mapping[str, Any], outdated: str = "", **params: Any) -> Run:
    given = {"seed": 7, SPLIT_SEED: 7, "hardware.workers": 1, "train.epochs": 3} | {
        key.replace("__", "."): value for key, value in params.items()
    }
    return Run(name, name * 8, given, metrics, frozenset(outdated.split()))


def grid(values: Mapping[tuple[Any, int], float], metric: str = CHOOSE_BY) -> list[Run]:
    """Runs of (learning rate, seed) with one metric; each also has a VAL_TEST MCC, the metric + 1."""
    return [
        run(f"x{i}", {metric: value, REPORTED: value + 1}, train__learning_rate=rate, seed=seed)
        for i, ((rate, seed), value) in enumerate(values.items())
    ]


VALUES = {
    (0.1, 1): 0.70, (0.1, 2): 0.80, (0.1, 3): 0.90,
    (0.2, 1): 0.75, (0.2, 2): 0.83, (0.2, 3): 0.97,
    (0.3, 1): 0.60, (0.3, 2): 0.72, (0.3, 3): 0.81,
}  # fmt: skip


def test_seeds_are_aggregated_by_configuration() -> None:
    summary = summarise(grid(VALUES))
    assert [each.params for each in summary.configurations] == [
        {"train.learning_rate": rate} for rate in (0.2, 0.1, 0.3)
    ]
    best = summary.best
    assert best.score.mean == pytest.approx(0.85)
    assert best.score.sd == pytest.approx(np.std([0.75, 0.83, 0.97], ddof=1))
    assert best.values == {"1": 0.75, "2": 0.83, "3": 0.97}
    assert best.experiments == ["x3", "x4", "x5"]
    # VAL_TEST of the chosen one alone.
    assert summary.reported is not None
    assert summary.reported.mean == pytest.approx(1.85)
    assert summary.corrected is not None
    assert summary.corrected < best.score.mean


def test_what_a_seed_does_to_all_is_no_noise() -> None:
    """With shared seeds the noise is the residual of a two-way layout, by hand."""
    summary = summarise(grid(VALUES))
    table = np.array([[VALUES[rate, seed] for seed in (1, 2, 3)] for rate in (0.1, 0.2, 0.3)])
    rows = [[value - row.mean() for value in row] for row in table]
    rest = np.array(rows) - np.array(rows).mean(axis=0)
    assert summary.paired
    assert summary.noise == pytest.approx(np.sqrt((rest**2).sum() / 4))
    # Other seeds in each configuration: the deviation within them, pooled.
    alone = summarise(
        grid({(rate, seed + round(rate * 100)): v for (rate, seed), v in VALUES.items()})
    )
    assert not alone.paired
    assert alone.noise == pytest.approx(np.sqrt((np.array(rows) ** 2).sum() / 6))
    assert alone.noise is not None
    assert summary.noise is not None
    assert alone.noise > 3 * summary.noise


def test_a_seed_run_twice_counts_once_and_hardware_is_no_axis() -> None:
    runs = grid({(0.1, 1): 0.7, (0.1, 2): 0.8, (0.2, 1): 0.6, (0.2, 2): 0.65})
    again = run("again", {CHOOSE_BY: 0.71}, train__learning_rate=0.1, hardware__workers=4, seed=1)
    summary = summarise([*runs, again])
    assert summary.best.values == {"1": 0.7, "2": 0.8}
    assert list(summary.best.params) == ["train.learning_rate"]


@pytest.mark.parametrize(("metric", "highest"), [(LOSS, False), (GAIN, True), (CHOOSE_BY, True)])
def test_the_end_that_is_best(metric: str, highest: bool) -> None:
    runs = grid({(0.1, 1): 0.7, (0.2, 1): 0.6}, metric)
    assert summarise(runs, metric).best.params["train.learning_rate"] == (0.1 if highest else 0.2)
    turned = summarise(runs, metric, highest=not highest)
    assert turned.best.params["train.learning_rate"] == (0.2 if highest else 0.1)


def test_a_metric_that_is_text_or_huge_in_one_experiment() -> None:
    runs = grid({(0.1, 1): 0.7, (0.2, 1): 0.6})
    text = run("text", {CHOOSE_BY: "high"}, train__learning_rate=0.3, seed=1)
    assert len(summarise([*runs, text]).configurations) == 2
    huge = run("huge", {CHOOSE_BY: 10**200}, train__learning_rate=0.3, seed=1)
    with pytest.raises(UserError, match=r"mcc of huge is beyond 1e\+100"):
        summarise([*runs, huge])


def test_the_lowest_is_corrected_upwards() -> None:
    mirrored = summarise(grid({key: -value for key, value in VALUES.items()}, LOSS), LOSS)
    straight = summarise(grid(VALUES))
    assert mirrored.optimism is not None
    assert mirrored.optimism == pytest.approx(straight.optimism)
    assert mirrored.corrected == pytest.approx(-(straight.corrected or 0))


def test_one_seed_cannot_be_corrected() -> None:
    summary = summarise(grid({(0.1, 1): 0.7, (0.2, 1): 0.6}))
    assert summary.optimism is summary.noise is summary.corrected is None
    assert "no configuration was run with two seeds" in render(summary)


def test_val_test_is_not_shown_over_several_splits() -> None:
    """Images of one split's VAL_TEST are in another's VAL_SELECT, which chose."""
    runs = [
        run(f"x{i}", {CHOOSE_BY: 0.7 + i / 100, REPORTED: 0.9}, seed=i, data__split_seed=i)
        for i in (1, 2)
    ]
    older = [
        replace(each, params={k: v for k, v in each.params.items() if k != SPLIT_SEED})
        for each in runs  # their split followed `seed`
    ]
    fixed = [replace(each, params=each.params | {SPLIT_SEED: 7}) for each in runs]
    for several in (runs, older):
        summary = summarise(several)
        assert (summary.reported, summary.splits) == (None, 2)
        assert "the experiments have 2 splits (data.split_seed)" in render(summary)
        assert "0.9" not in render(summary)
    assert summarise(fixed).reported is not None
    assert "VAL_TEST of the best, metrics/evaluation.json:mcc: 0.9000" in render(summarise(fixed))


def test_only_runs_whose_stage_ran_count() -> None:
    runs = grid({(0.1, 1): 0.7, (0.2, 1): 0.6})
    stale = run("stale", {CHOOSE_BY: 0.99}, "metrics/train.json", train__learning_rate=0.3)
    assert len(summarise([*runs, stale]).configurations) == 2
    with pytest.raises(
        UserError, match=r"no experiment has run the stage that writes metrics/train\.json"
    ):
        summarise([stale])
    unread = run("unread", {CHOOSE_BY: 0.9, REPORTED: 0.5}, "metrics/evaluation.json")
    summary = summarise([unread])
    assert summary.reported is None
    assert "dvc exp apply unread && dvc repro" in render(summary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metric": "metrics/evaluation.json:mcc"},
            "measured on VAL_TEST, which may choose nothing",
        ),
        ({"metric": "mcc"}, "measured on VAL_TEST"),
        (
            {"metric": "val_select.mc"},
            "is no metric of these experiments; name one like metrics/train",
        ),
        ({"seeds": "train.seed"}, 'x0 has no parameter "train.seed"'),
    ],
)
def test_mistakes(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        summarise(grid(VALUES), **arguments)


def test_the_metrics_of_val_test_are_known() -> None:
    stages = read_dvc_yaml(REPOSITORY)["stages"].values()
    reading = [each for each in stages if "data/splits/val_test.arrow" in each["deps"]]
    made = {name for each in reading for name in outputs(each) if name.endswith(".json")}
    reading += [each for each in stages if made & set(each["deps"])]
    shown = {name for each in reading for name in outputs(each) if name.startswith("metrics/")}
    assert {name for name in shown if name.endswith(".json")} == set(TEST_METRICS)


def test_nothing_to_choose() -> None:
    with pytest.raises(UserError, match="no finished experiments"):
        summarise([])
    runs = [
        run(f"x{i}", {CHOOSE_BY: 0.7, LOSS: 0.1 * i, REPORTED: i}, decision__calibrator=name)
        for i, name in enumerate(("platt", "beta"))
    ]
    message = f"is the same in all 2 configurations; these differ: {LOSS}$"
    with pytest.raises(UserError, match=message):
        summarise(runs)
    twice = grid({(0.1, 1): 0.7, (0.2, 1): 0.6})
    both = [Run(r.name, r.commit, r.params, {**r.metrics, "b.json:val_select.mcc": 1.0}, r.outdated)
            for r in twice]  # fmt: skip
    with pytest.raises(UserError, match=r"is in several files; name one like metrics/train\.json:"):
        summarise(both, "val_select.mcc")


# --------------------------------------------------------------------------- the correction


def simulate(
    k: int, n_seeds: int, spread: float, *, paired: bool, n: int = 400
) -> tuple[float, float]:
    """Mean bias of the best mean and of the corrected one, over `n` sweeps of k configurations.

    Truths have the deviation `spread`, runs a noise of 1, and seeds an effect of 2, shared if `paired`.
    """
    rng = np.random.default_rng(k * 100 + n_seeds)
    raw, corrected = [], []
    for _ in range(n):
        truth = spread * rng.standard_normal((k, 1))
        shared = 2 * rng.standard_normal((1, n_seeds)) if paired else np.zeros((1, n_seeds))
        table = truth + shared + rng.standard_normal((k, n_seeds))
        means = table.mean(axis=1)
        if paired:
            rest = table - means[:, None] - table.mean(axis=0) + table.mean()
            freedom = (k - 1) * (n_seeds - 1)
        else:
            rest, freedom = table - means[:, None], k * (n_seeds - 1)
        error = np.sqrt((rest**2).sum() / freedom / n_seeds)
        best = means.argmax()
        excess = means[best] - truth[best, 0] - shared.mean()
        raw.append(excess)
        corrected.append(excess - optimism_of_the_maximum(means, np.full(k, error), draws=500))
    return float(np.mean(raw)), float(np.mean(corrected))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("k", "n_seeds"), [(4, 3), (12, 3), (12, 5)])
def test_most_of_the_optimism_is_removed_when_nothing_differs(
    k: int, n_seeds: int, paired: bool
) -> None:
    raw, corrected = simulate(k, n_seeds, 0.0, paired=paired)
    assert raw > 0.4
    assert abs(corrected) < 0.25 * raw


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_differences_that_are_there_are_not_corrected_away(spread: float) -> None:
    raw, corrected = simulate(12, 3, spread, paired=True)
    assert raw > 0.1
    assert abs(corrected) < 0.25 * raw


def test_optimism_of_the_maximum_by_hand() -> None:
    # Two means alike: E max of two normals with standard error s is s / sqrt(pi).
    assert optimism_of_the_maximum([0.5, 0.5], [0.1, 0.1]) == pytest.approx(
        0.1 / np.sqrt(np.pi), rel=0.03
    )
    assert optimism_of_the_maximum([0.5], [0.1]) == 0
    assert optimism_of_the_maximum([0.5, 0.4], [0.0, 0.0]) == 0
    # Far apart: whoever leads, leads rightly.
    assert optimism_of_the_maximum([5.0, 0.0], [0.1, 0.1]) == pytest.approx(0, abs=0.002)
    # A mean of many seeds gives less room for luck than one of few.
    few = optimism_of_the_maximum([0.5, 0.5], [0.1, 0.1])
    assert optimism_of_the_maximum([0.5, 0.5], [0.1, 0.02]) < few


# --------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(grid(VALUES))


def test_text_and_markdown(summary: Summary) -> None:
    lines = render(summary).splitlines()
    assert lines[0] == f"{CHOOSE_BY}, the highest is best: 3 configurations, 9 runs over seed"
    assert lines[2].split() == ["train.learning_rate", "seeds", "mean", "±", "sd", "experiments"]
    assert lines[3].split() == ["0.2", "3", "0.8500", "±", "0.1114", "x3", "x4", "x5"]
    assert lines[7] == "best: train.learning_rate=0.2, 0.8500 ± 0.1114"
    assert lines[8].startswith("corrected for having been the best of 3: 0.8")
    assert lines[9] == f"VAL_TEST of the best, {REPORTED}: 1.8500 ± 0.1114"
    # VAL_TEST of the others is nowhere.
    assert "1.80" not in render(summary)
    markdown = render(summary, markdown=True).splitlines()
    assert markdown[3:5] == [
        "| --- | --- | --- | --- |",
        "| 0.2 | 3 | 0.8500 ± 0.1114 | x3 x4 x5 |",
    ]
    assert markdown[8] == "- best: train.learning_rate=0.2, 0.8500 ± 0.1114"


def test_json_and_columns(summary: Summary) -> None:
    found = json.loads(json_text(document(summary)))
    assert found["corrected"] == pytest.approx(
        found["configurations"][0]["score"]["mean"] - found["optimism"]
    )
    assert [each["params"]["train.learning_rate"] for each in found["configurations"]] == [
        0.2,
        0.1,
        0.3,
    ]
    rows = columns(summary)
    assert list(rows) == ["rank", "train.learning_rate", "seed", CHOOSE_BY, "experiment"]
    assert rows["experiment"] == ["x3", "x4", "x5", "x0", "x1", "x2", "x6", "x7", "x8"]
    assert rows[CHOOSE_BY][:3] == [0.75, 0.83, 0.97]


def test_the_picture_grows_with_the_axes(summary: Summary) -> None:
    runs = [
        run(
            f"x{i}",
            {CHOOSE_BY: 0.1 * i},
            train__learning_rate=rate,
            train__loss=loss,
            data__sources=data,
        )
        for i, (rate, loss, data) in enumerate(
            [(1, "ce", [1]), (10, "focal", [1, 2]), (2, "ce", [1])]
        )
    ]
    sizes = [
        Image.open(io.BytesIO(plot_parallel_coordinates(s))).size
        for s in (summary, summarise(runs))
    ]
    assert sizes[0][0] < sizes[1][0]
    assert sizes[0][1] == sizes[1][1]
    assert plot_parallel_coordinates(summary) == plot_parallel_coordinates(summary)
