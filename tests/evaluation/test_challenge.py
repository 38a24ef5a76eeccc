"""The challenge report: rates by level and class, the reward they earn, intervals, files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streetvision.artifacts import json_text
from streetvision.bundle.predictor import Predictor
from streetvision.data.distort import challenge_jpeg, challenge_rng
from streetvision.data.store import open_split
from streetvision.errors import UserError
from streetvision.evaluation.bootstrap import group_intervals
from streetvision.evaluation.challenge import challenge_report, challenge_split, write_challenge
from streetvision.evaluation.reward import reward_moments
from streetvision.params import Challenge

SMALL: dict[str, Any] = {"n_resamples": 200, "simulated_days": 3, "challenges_per_day": 20}


def sample(n: int, groups: int, repeats: int = 1, levels: int = 4) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 2, n)
    noise = rng.normal(0, 0.35, (n, levels, repeats)) * np.arange(1, levels + 1)[:, None]
    return (
        labels,
        np.clip(labels[:, None, None] * 0.6 + 0.2 + noise, 0, 1),
        rng.integers(0, groups, n),
    )


@pytest.mark.parametrize("groups", [80, 20])
def test_equal_shares_are_the_pooled_images(groups: int) -> None:
    labels, p, index = sample(400, groups, repeats=2)
    report = challenge_report(labels, p, index, [0, 1, 2, 3], Challenge(**SMALL), 0.5, 3).report
    pooled = group_intervals(np.repeat(labels, 8), p.ravel(), np.repeat(index, 8), 0.5, 200, seed=3)
    for name in ("accuracy", "mcc", "fnr", "fpr"):
        assert report[name] == pytest.approx(pooled[name].value)
        found = report["interval"][name]
        assert found["low"] == pytest.approx(pooled[name].low)
        assert found["high"] == pytest.approx(pooled[name].high)
        alone = group_intervals(np.repeat(labels, 2), p[:, 2].ravel(), np.repeat(index, 2), 0.5)
        assert report["levels"]["level_2"][name] == pytest.approx(alone[name].value)
    assert report["interval_method"] == pooled["mcc"].method
    mean, deviation = reward_moments(1 - report["fnr"], report["fpr"], 0.5)
    reward = report["reward"]
    assert reward["mean"] == pytest.approx(mean[0])
    assert reward["standard_deviation"] == pytest.approx(deviation[0])
    assert reward["low"] < reward["mean"] < reward["high"]
    assert report["rival"]["low"] <= report["rival"]["probability_to_beat"]


def test_shares_weigh_the_levels() -> None:
    labels, p, index = sample(300, 30)
    one = Challenge(**SMALL, level_0=0, level_1=0, level_2=1, level_3=0)
    report = challenge_report(labels, p[:, 2:3], index, [2], one, 0.5, 3).report
    assert set(report["levels"]) == {"level_2"}
    assert report["mcc"] == pytest.approx(report["levels"]["level_2"]["mcc"])
    uneven = Challenge(**SMALL, level_0=0.7, level_1=0.1, level_2=0.1, level_3=0.1)
    report = challenge_report(labels, p, index, [0, 1, 2, 3], uneven, 0.5, 3).report
    wanted = sum(level["share"] * level["fnr"] for level in report["levels"].values())
    assert report["fnr"] == pytest.approx(wanted)


def test_too_few_groups_give_no_interval() -> None:
    labels, p, index = sample(100, 4)
    report = challenge_report(labels, p, index, [0, 1, 2, 3], Challenge(**SMALL), 0.5, 3).report
    assert report["interval_method"].startswith("none: rests on 4 groups")
    assert set(report["interval"]["mcc"]) == set()
    assert "low" not in report["reward"]
    json_text(report)


def test_one_class_is_refused(trained: Any, write_split: Any, tmp_path: Path) -> None:
    path = write_split(tmp_path / "val_test.arrow", 4, labels=[1] * 4)
    with pytest.raises(UserError, match="both classes must be present"):
        challenge_split(
            Predictor.load(trained.bundle, "cpu"), open_split("challenge", "val_test", path),
            Challenge(**SMALL), 0.5, seed=7, workers=1,
        )  # fmt: skip


def test_a_split_through_a_bundle(
    trained: Any, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    split = open_split("challenge", "val_test", tiny_splits["val_test"])
    settings = Challenge(**SMALL, repeats=2)
    found = challenge_split(predictor, split, settings, 0.5, seed=7, workers=1)
    wrong = []
    for row, name in enumerate(split.ids):
        data = challenge_jpeg(split.image(row), 3, challenge_rng(7, name, 3, 1))
        p = predictor(Image.open(io.BytesIO(data)))
        wrong.append((p > 0.5) != split.labels[row])
    # The second repeat of level 3 alone is half of that level's images.
    level = found.report["levels"]["level_3"]
    missed = np.mean(np.array(wrong)[split.labels == 1])
    assert abs(2 * level["fnr"] - missed) <= 1
    assert (2 * level["fnr"] - missed) * (split.labels == 1).sum() == pytest.approx(
        round((2 * level["fnr"] - missed) * (split.labels == 1).sum())
    )
    again = challenge_split(predictor, split, settings, 0.5, seed=7, workers=2)
    assert json_text(again.report) == json_text(found.report)
    assert again.plots == found.plots
    written = write_challenge(found, tmp_path / "challenge.json", tmp_path / "plots")
    assert [path.name for path in written] == [
        "challenge_levels.png", "reward.png", "challenge.json",
    ]  # fmt: skip
    assert json.loads(written[-1].read_text()) == found.report
    for path in written[:-1]:
        with Image.open(path) as image:
            assert min(image.size) > 300
