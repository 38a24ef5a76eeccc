"""The dozen numbers of `metrics/headline.json`, and the line that says them."""

from __future__ import annotations

import numpy as np
import pytest

from streetvision.evaluation.headline import HEADLINE, headline_of, in_words
from streetvision.evaluation.report import evaluation_report, one_class_report

TRAIN = {"val_select": {"mcc": 0.75, "loss": 0.2}}
CHALLENGE = {"mcc": 0.5, "reward": {"mean": 0.25, "low": 0.125, "high": 0.375}}


def report(groups: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    probabilities = np.clip(0.5 + 0.3 * (2 * labels - 1) + rng.normal(0, 0.2, 400), 0.01, 0.99)
    return evaluation_report(labels, probabilities, np.arange(400) // 2 % groups, {}, 0.5, 1, 200)


def test_each_number_is_that_of_its_file() -> None:
    evaluation = report(80)
    found = headline_of(TRAIN, evaluation, CHALLENGE)
    assert list(found) == list(HEADLINE)
    assert len(found) == 12
    assert found["mcc"] == evaluation["mcc"]
    assert found["ece"] == evaluation["ece"]
    for name in ("mcc", "ece_debiased"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert {key: found[key] for key in list(HEADLINE)[-5:]} == {
        "challenge_mcc": 0.5, "reward": 0.25, "reward_low": 0.125, "reward_high": 0.375,
        "val_select_mcc": 0.75,
    }  # fmt: skip


def test_what_does_not_exist_is_left_out() -> None:
    # Four groups have no interval, images of one class neither MCC nor ECE.
    found = headline_of({"val_select": {}}, report(4), CHALLENGE)
    assert list(found)[:3] == ["mcc", "ece", "ece_debiased"]
    assert "val_select_mcc" not in found
    one = one_class_report(np.ones(20, int), np.full(20, 0.75), np.arange(20), {}, 0.5, 1, 50)
    assert headline_of(TRAIN, one, {}) == {"val_select_mcc": 0.75}


@pytest.mark.parametrize(
    ("headline", "said"),
    [
        (
            {"mcc": 0.5, "mcc_low": 0.25, "mcc_high": 0.75, "ece": 0.125},
            "mcc 0.5000 (0.2500 to 0.7500), ece 0.1250",
        ),
        ({"reward": 0.25, "reward_low": 0.1}, "reward 0.2500"),
        ({}, "no metric exists"),
    ],
)
def test_in_words(headline: dict[str, float], said: str) -> None:
    assert in_words(headline) == said
