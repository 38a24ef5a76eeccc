from __future__ import annotations

import json
import math

import numpy as np
import pytest

from streetvision.core.errors import UserError
from streetvision.evaluation.report import evaluation_report, safe_key
from streetvision.stats.metrics import (
    METRIC_NAMES,
    PLAIN_ECE,
    all_metrics,
    mcc_from_counts,
    prior_weights,
)

N_GROUPS = 80
RNG = np.random.default_rng(0)
GROUPS = RNG.integers(0, N_GROUPS, 1200)
Y = (RNG.random(1200) < 0.75).astype(int)
P = 1 / (1 + np.exp(-(2 * Y - 1 + RNG.normal(0, 1, 1200))))
WEATHER = RNG.choice(["clear", "light.rain", "light rain", ""], 1200)
SIZE = np.where(Y == 1, RNG.choice(["<2%", "2-10%", ""], 1200), "")


def report(**changes):
    arguments = {
        "labels": Y,
        "probabilities": P,
        "groups": GROUPS,
        "slices": {"weather": WEATHER, "evidence_size": SIZE},
        "served_prior": 0.5,
        "seed": 0,
        "n_resamples": 200,
        "against_all_negatives": {"evidence_size"},
    }
    return evaluation_report(**(arguments | changes))


@pytest.fixture(scope="module")
def full():
    return report()


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def test_leaves_are_finite_scalars_under_sorted_safe_keys(full):
    for path, value in leaves(full):
        assert type(value) in {int, float, str}, path
        assert isinstance(value, str) or math.isfinite(value), path
        assert all("." not in key and " " not in key for key in path), path
    assert json.dumps(full) == json.dumps(full, sort_keys=True, allow_nan=False)


def test_report_depends_on_its_arguments_alone(full):
    assert report() == full
    assert report(seed=1)["served_interval"] != full["served_interval"]
    assert report(seed=1)["served"] == full["served"]


def test_headline_is_at_the_served_prior_and_natural_beside_it(full):
    served, natural = all_metrics(Y, P, prior_weights(Y, 0.5)), all_metrics(Y, P)
    assert full["served"] == pytest.approx(served)
    assert full["natural"] == pytest.approx(natural)
    assert (full["mcc"], full["ece"]) == (full["served"]["mcc"], full["served"]["ece"])
    assert abs(full["mcc"] - full["natural"]["mcc"]) > 0.01
    assert full["positive_share"] == pytest.approx(Y.mean())
    assert (full["n"], full["n_groups"]) == (1200, N_GROUPS)
    c = full["confusion"]
    assert natural["mcc"] == pytest.approx(mcc_from_counts(c["tp"], c["fp"], c["tn"], c["fn"]))
    assert sum(c.values()) == 1200


def test_every_metric_has_an_interval_round_it(full):
    assert full["interval_method"] == "group_bootstrap_percentile"
    for kind in ("served", "natural"):
        assert set(full[f"{kind}_interval"]) == set(METRIC_NAMES) - set(PLAIN_ECE)
        for name in ("mcc", "accuracy", "roc_auc", "brier"):
            interval = full[f"{kind}_interval"][name]
            assert interval["low"] < full[kind][name] < interval["high"]


def test_effective_groups_are_those_of_each_class(full):
    for label, name in enumerate(("negatives", "positives")):
        sizes = np.bincount(GROUPS[label == Y], minlength=N_GROUPS)
        wanted = sizes.sum() ** 2 / (sizes**2).sum()
        assert full["effective_groups"][name] == pytest.approx(wanted)
    one = report(groups=np.where(GROUPS < 60, 0, GROUPS))
    assert one["effective_groups"]["positives"] < 2
    assert one["served_interval"] == {}
    assert "effective groups (of 21), at least 4.5 are needed" in one["interval_method"]


def test_ece_comes_with_what_it_takes_to_read_it(full):
    detail = full["ece_detail"]
    assert (detail["bins"], detail["n"], detail["groups"]) == (15, 1200, N_GROUPS)
    assert 0 < detail["noise_floor"] < detail["noise_floor_upper"] < 0.1


def test_slices_are_metrics_of_their_images(full):
    clear = full["slices"]["weather"]["clear"]
    own = WEATHER == "clear"
    expected = all_metrics(Y[own], P[own], prior_weights(Y[own], 0.5))
    assert clear["n"] == own.sum()
    assert clear["n_groups"] == len(np.unique(GROUPS[own]))
    assert clear["n_positive"] == Y[own].sum()
    for name in ("mcc", "accuracy", "recall", "fnr", "fpr"):
        assert clear[name] == pytest.approx(expected[name])
    # Two values that share a safe key stay apart, and no image is lost.
    assert set(full["slices"]["weather"]) == {"clear", "light_rain", "light_rain_", "unknown"}
    assert sum(s["n"] for s in full["slices"]["weather"].values()) == 1200


def test_evidence_is_scored_against_all_negatives(full):
    small = full["slices"]["evidence_size"]["2"]
    own = (SIZE == "<2%") & (Y == 1)
    scored = own | (Y == 0)
    expected = all_metrics(Y[scored], P[scored], prior_weights(Y[scored], 0.5))
    assert set(full["slices"]["evidence_size"]) == {"2", "2-10"}
    assert (small["n"], small["n_positive"]) == (own.sum(), own.sum())
    assert small["mcc"] == pytest.approx(expected["mcc"])
    assert small["recall"] == pytest.approx((P[own] > 0.5).mean())
    assert "fpr" not in small


def test_slice_of_one_class_reports_what_exists():
    kind = np.where(Y == 1, "yes", "no")
    got = report(slices={"kind": kind}, against_all_negatives=())["slices"]["kind"]
    assert set(got["yes"]) == {"n", "n_groups", "n_positive", "recall", "fnr"}
    assert set(got["no"]) == {"n", "n_groups", "n_positive", "fpr"}


def test_too_few_groups_leave_out_intervals_and_say_why():
    got = report(groups=GROUPS % 4)
    assert got["served_interval"] == {}
    assert "rests on 4.0 effective groups (of 4)" in got["interval_method"]
    assert report(groups=GROUPS % 30)["interval_method"] == "group_jackknife_t"


def test_missing_values_are_unknown():
    values = np.array(["a", None] * 600, dtype=object)
    got = report(slices={"scene.kind": values}, against_all_negatives=())
    assert set(got["slices"]["scene_kind"]) == {"a", "unknown"}


def test_safe_keys():
    assert safe_key("a.b / c") == "a_b_c"
    assert safe_key("...") == "unknown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.ones(1200)}, "both classes"),
        ({"slices": {"weather": WEATHER[:5]}, "against_all_negatives": ()}, "one value per image"),
        ({"against_all_negatives": {"size"}}, "no slice 'size'"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        report(**changes)
