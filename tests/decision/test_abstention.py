"""The abstention band of a policy: what is fitted, carried by the document, and promised."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from streetvision.core.errors import UserError
from streetvision.decision.abstention import Abstention, Answers, fit_abstention
from streetvision.decision.calibrators import PlattMap
from streetvision.decision.policy import (
    Policy,
    fit_abstaining_policy,
    fit_policy,
    policy_from_document,
    scrc_document,
)
from streetvision.decision.report import calibration_metrics
from streetvision.decision.scrc import (
    candidate_thresholds,
    class_weights,
    group_risks,
    guarantee_groups,
    scrc_t,
)

Floats = NDArray[np.float64]
BAND = Abstention("scrc_t", "error", 0.05, None, 40, 0.3)
ASKED: dict[str, Any] = {
    "method": "scrc_t", "control": "error", "alpha": 0.1, "delta": 0.1, "guarantee_fraction": 0.5,
}  # fmt: skip


def simulated(
    seed: int, groups: int = 120, sharpness: float = 5.0
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.intp]]:
    """Logits of an overconfident model at a prior of about 0.7, in groups that differ."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(groups), 15)
    ratio = rng.normal(1.2, sharpness, codes.size)
    labels = rng.random(codes.size) < expit(ratio + 0.7 * rng.normal(size=groups)[codes])
    return 1.8 * ratio, labels, codes


def fitted(data: Any, **changes: Any) -> tuple[Policy, dict[str, Any]]:
    return fit_abstaining_policy(*data, 0.5, 100, 0, **(ASKED | changes))


@pytest.mark.parametrize("control", ["error", "fnr"])
@pytest.mark.parametrize(("method", "alpha"), [("scrc_t", 0.1), ("scrc_i", 0.2)])
def test_the_map_never_sees_the_groups_that_hold_the_guarantee(
    method: str, alpha: float, control: str
) -> None:
    logits, labels, groups = simulated(0)
    policy, report = fitted((logits, labels, groups), method=method, alpha=alpha, control=control)
    held = guarantee_groups(groups, 0.5, 0)
    alone, alone_report = fit_policy(logits[~held], labels[~held], groups[~held], 0.5, 100, 0)
    assert replace(policy, abstention=None) == alone
    assert {k: v for k, v in report.items() if k != "abstention"} == alone_report
    found = report["abstention"]
    assert found["promised"]
    assert (found["groups"], found["images"]) == (60, 900)
    assert found["alpha_limit"] < found["smallest_alpha"] <= alpha
    assert found["groups_needed"] <= 60
    assert 0 < found["acceptance"] <= 1
    assert found["risk"] <= alpha
    # The labels of the held groups move the band alone.
    turned = np.where(held, ~labels, labels)
    other, other_report = fitted((logits, turned, groups), method=method, alpha=alpha)
    assert replace(other, abstention=None) == alone
    assert other.abstention is not None
    assert other.abstention.min_confidence is None
    assert not other_report["abstention"]["promised"]
    assert "risk" not in other_report["abstention"]
    assert "groups_needed" not in other_report["abstention"]


def test_the_band_is_what_the_pure_functions_choose() -> None:
    logits, labels, groups = simulated(1)
    policy, _ = fitted((logits, labels, groups))
    held = guarantee_groups(groups, 0.5, 0)
    p = policy.deployed_probability(logits)
    weights = class_weights(policy.calibration_prior, 0.5)
    thresholds = candidate_thresholds(p[~held], labels[~held], groups[~held], weights)
    risks = group_risks(p[held], labels[held], groups[held], thresholds, weights)
    chosen = scrc_t(risks, 0.1)
    assert chosen is not None
    assert policy.abstention == Abstention("scrc_t", "error", 0.1, None, 60, thresholds[chosen])
    accepted = policy.accepts(logits)
    np.testing.assert_array_equal(accepted, np.abs(p - 0.5) >= thresholds[chosen])
    assert 0 < accepted.mean() < 1


@pytest.mark.parametrize(("method", "alpha"), [("scrc_t", 0.08), ("scrc_i", 0.15)])
def test_the_whole_chain_keeps_its_promise(method: str, alpha: float) -> None:
    # Map, threshold and band fitted anew each time; new groups, weighted to the served prior.
    logits, labels, _ = simulated(999, 2000)
    weights = np.where(labels, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    risks, accepted = [], []
    for seed in range(30):
        policy, _ = fitted(simulated(seed), method=method, alpha=alpha)
        kept = policy.accepts(logits)
        wrong = policy.decide(logits) != labels
        risks.append(np.average(wrong[kept], weights=weights[kept]) if kept.any() else 0.0)
        accepted.append(kept.mean())
    assert np.mean(risks) <= alpha
    if method == "scrc_i":
        assert np.mean(np.array(risks) > alpha) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / 30)
    assert np.mean(accepted) > 0.5


def test_too_few_groups_promise_nothing_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    logits, labels, groups = simulated(2, 20)
    policy, report = fitted((logits, labels, groups), alpha=0.05)
    found = report["abstention"]
    assert policy.abstention is not None
    assert policy.abstention.min_confidence is None
    assert not policy.accepts(logits).any()
    assert "10 groups cannot promise the level 0.05" in caplog.text
    assert "nothing is accepted" in policy.abstention.guarantee
    assert not found["promised"]
    assert found["acceptance"] == 0
    # All accepted and none wrong: B / (Σ A + B), where a group accepts the mean weight of its images.
    held = guarantee_groups(groups, 0.5, 0)
    weights = np.array(class_weights(policy.calibration_prior, 0.5))
    accepted = sum(weights[labels[groups == g].astype(int)].mean() for g in np.unique(groups[held]))
    assert found["alpha_limit"] == pytest.approx(weights.max() / (accepted + weights.max()))
    assert found["smallest_alpha"] > found["alpha_limit"] > 0.05
    # With so many more groups like these the level could be promised; none is needed fewer than there are.
    assert found["groups_needed"] > 10


def test_abstention_changes_no_probability_and_no_decision() -> None:
    plain = Policy(PlattMap(1.0, 0.2), 0.6, 0.5)
    banded = replace(plain, abstention=BAND)
    logits = np.linspace(-5, 5, 101)
    assert (
        banded.deployed_probability(logits).tobytes()
        == plain.deployed_probability(logits).tobytes()
    )
    np.testing.assert_array_equal(banded.decide(logits), plain.decide(logits))
    assert plain.accepts(logits).all()
    p = plain.deployed_probability(logits)
    np.testing.assert_array_equal(banded.accepts(logits), (p <= 0.2) | (p >= 0.8))
    # Calibrated and deployed probabilities stay apart.
    shifted = replace(banded, threshold_shift=0.7)
    np.testing.assert_array_equal(shifted.calibrated_probability(logits), p)
    assert (shifted.deployed_probability(logits) > p).all()


@pytest.mark.parametrize(
    "band",
    [
        BAND,
        replace(BAND, method="scrc_i", delta=0.1, control="fnr"),
        replace(BAND, min_confidence=None),
    ],
)
def test_the_document_is_complete(band: Abstention) -> None:
    policy = Policy(PlattMap(1.0, 0.2), 0.6, 0.5, 0.1, band)
    report = {"metrics": {"before": {}, "after": None}}
    document = json.loads(json.dumps(scrc_document(policy, report), allow_nan=False))
    assert policy_from_document(document) == policy
    stored = document["scrc_params"]["abstention"]
    assert f"{band.alpha:g}" in stored["guarantee"]
    assert (stored["guarantee"].startswith("none")) == (band.min_confidence is None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "crc", "abstention.method 'crc' is not one of scrc_t, scrc_i"),
        ("control", "fpr", "abstention.control 'fpr' is not one of error, fnr"),
        ("alpha", 1.5, "abstention.alpha is 1.5; a level between 0 and 1"),
        ("alpha", "low", "abstention.alpha is 'low'"),
        ("delta", 0.1, "abstention.delta is 0.1 with scrc_t"),
        ("n_groups", 0, "abstention.n_groups is 0"),
        ("n_groups", 2.5, "abstention.n_groups is 2.5"),
        ("min_confidence", 0.6, r"abstention.min_confidence is 0.6; it must be in \[0, 0.5\]"),
        (
            "exchangeable_unit",
            "image",
            "exchangeable_unit is 'image'; it must be one of group, drive",
        ),
        ("guarantee", "always right", "abstention.guarantee is 'always right', but the other keys"),
        ("beta", 1, "abstention has unknown beta"),
    ],
)
def test_document_errors_name_the_key(key: str, value: Any, message: str) -> None:
    report = {"metrics": {"before": {}, "after": None}}
    policy = Policy(PlattMap(1.0, 0.2), 0.6, 0.5, abstention=BAND)
    document = deepcopy(scrc_document(policy, report))
    document["scrc_params"]["abstention"][key] = value
    with pytest.raises(UserError, match=message):
        policy_from_document(document)
    del document["scrc_params"]["abstention"][key]
    if key != "beta":
        with pytest.raises(UserError, match=f"abstention lacks {key}"):
            policy_from_document(document)


@pytest.mark.parametrize("method", ["scrc_t", "scrc_i"])
@pytest.mark.parametrize("least", [0.2, None])
def test_drives_as_units_say_what_they_take_for_granted(method: Any, least: float | None) -> None:
    delta = None if method == "scrc_t" else 0.1
    band = Abstention(method, "error", 0.05, delta, 40, least, "drive")
    group = Abstention(method, "error", 0.05, delta, 40, least)
    document = json.loads(json.dumps(band.to_dict()))
    assert document["exchangeable_unit"] == "drive"
    assert Abstention.from_dict(document) == band != group
    assert ("taken for independent" in band.guarantee) == (least is not None)
    assert "group" not in band.guarantee.split(";")[0]
    assert "independent, which" not in group.guarantee
    # The promise of groups may not be claimed for drives.
    with pytest.raises(UserError, match=r"abstention\.guarantee is"):
        Abstention.from_dict(document | {"exchangeable_unit": "group"})


def test_one_class_left_to_fit_is_the_users_problem() -> None:
    logits, _, groups = simulated(0, 4)
    held = guarantee_groups(groups, 0.5, 0)
    with pytest.raises(UserError, match="2 groups left to fit the map on hold one class"):
        fitted((logits, held, groups))
    answers = Answers(np.full(4, 0.7), np.array([0, 1, 1, 0]), np.arange(4))
    negatives = answers._replace(labels=np.zeros(4, int))
    with pytest.raises(UserError, match="no image to control the risk on"):
        fit_abstention(
            answers, negatives, (1, 1), method="scrc_t", control="fnr", alpha=0.1, delta=0.1
        )


def test_metrics_have_scalar_leaves() -> None:
    data = simulated(3)
    for method in ("scrc_t", "scrc_i"):
        policy, report = fitted(data, method=method, alpha=0.2)
        metrics = calibration_metrics(report, policy, data[0], data[1], 0.5)
        assert metrics["groups"] == metrics["abstention"]["groups"] == 60
        assert ("delta" in metrics["abstention"]) == (method == "scrc_i")
        for value in metrics["abstention"].values():
            assert isinstance(value, int | float)
            assert np.isfinite(value)
