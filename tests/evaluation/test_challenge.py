"""The challenge report: rates by level and class, the reward they earn, intervals, files."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.metrics import matthews_corrcoef

from streetvision.bundle.predictor import Predictor
from streetvision.core.artifacts import json_text
from streetvision.core.errors import UserError
from streetvision.core.params import Challenge, SourceShare, Subnet
from streetvision.core.schema import ORIGINALS_SCHEMA
from streetvision.data.store import Originals, open_originals, open_split, write_arrow
from streetvision.evaluation.challenge import (
    Served,
    challenge_report,
    challenge_split,
    skew_report,
    source_weights,
    write_challenge,
)
from streetvision.stats.bootstrap import group_intervals
from streetvision.subnet.profiles import CROP, LETTERBOX, RAW
from streetvision.subnet.reward import reward_moments
from streetvision.subnet.served import Task, challenge_rng, served_jpeg, served_jpegs

ONE_SOURCE = np.array(["s"] * 400, dtype=object)
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
    report = challenge_report(
        labels, [Served(CROP, p)], index, ONE_SOURCE[: len(labels)], Challenge(**SMALL), 0.5, 3
    ).report
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
    uneven = replace(CROP, level_shares=(0.7, 0.1, 0.1, 0.1))
    report = challenge_report(
        labels, [Served(uneven, p)], index, ONE_SOURCE[:300], Challenge(**SMALL), 0.5, 3
    ).report
    assert [level["share"] for level in report["levels"].values()] == [0.7, 0.1, 0.1, 0.1]
    wanted = sum(level["share"] * level["fnr"] for level in report["levels"].values())
    assert report["fnr"] == pytest.approx(wanted)


def test_each_validator_has_its_own_numbers_and_the_first_leads() -> None:
    labels, p, index = sample(300, 60)
    whole = p[:, :1]
    served = [Served(RAW, whole), Served(CROP, p), Served(LETTERBOX, 1 - p)]
    arguments = (index, ONE_SOURCE[:300], Challenge(**SMALL), 0.5, 3)
    found = challenge_report(labels, served, *arguments).report
    assert found["validator"] == "raw"
    assert list(found["validators"]) == ["raw", "crop", "letterbox"]
    for each in served:
        alone = challenge_report(labels, [each], *arguments).report
        own = found["validators"][each.validator.name]
        assert own == alone["validators"][each.validator.name]
        wrong = (each.probabilities[:, :, 0] > 0.5) != (labels[:, None] == 1)
        assert own["fnr"] == pytest.approx(wrong[labels == 1].mean())
        assert ("levels" in own) == (each.validator is not RAW)
    assert found["mcc"] == found["validators"]["raw"]["mcc"] != found["validators"]["crop"]["mcc"]
    assert "levels" not in found
    assert found["challenges_scored"] == 300 * (1 + 4 + 4)
    assert "`raw`" in found["unmeasured"]


def test_skew_compares_whole_pictures_with_stored_ones() -> None:
    labels = np.array([0, 1, 0, 1])
    sent, stored = np.array([0.2, 0.9, 0.6, 0.8]), np.array([0.2, 0.9, 0.4, 0.6])
    found = skew_report(labels, sent, stored, 0.5)
    assert found["decisions_that_differ"] == 0.25
    assert found["mean_difference"] == pytest.approx(0.1)
    assert found["mcc_sent"] == pytest.approx(matthews_corrcoef(labels, sent > 0.5))
    assert found["mcc_stored"] == 1.0


def test_sources_are_mixed_by_their_shares() -> None:
    labels, p, index = sample(400, 70)
    sources = np.array(["real", "sdxl", "other", "real"] * 100, dtype=object)
    shares = [{"source": "sdxl", "share": 0.5}, {"source": "other", "share": 0.1}]
    mixed = Challenge(**SMALL, source_shares=shares)
    report = challenge_report(labels, [Served(CROP, p)], index, sources, mixed, 0.5, 3).report
    # The oracle: each class is one draw of a source by its share, then of an image of that source.
    wrong = (p[:, :, 0] > 0.5) != (labels[:, None] == 1)
    wanted = {"sdxl": 0.5, "other": 0.1, "real": 0.4}
    for name, positive in (("fnr", 1), ("fpr", 0)):
        rates = {s: wrong[(sources == s) & (labels == positive)].mean() for s in wanted}
        assert report[name] == pytest.approx(sum(wanted[s] * rates[s] for s in wanted))
        for source, rate in rates.items():
            assert report["sources"][source][name] == pytest.approx(rate)
        third = wrong[:, 2]
        alone = {s: third[(sources == s) & (labels == positive)].mean() for s in wanted}
        level = report["levels"]["level_2"][name]
        assert level == pytest.approx(sum(wanted[s] * alone[s] for s in wanted))
    for source, share in wanted.items():
        assert report["sources"][source]["share"] == pytest.approx(share)
    assert "not known" in report["unmeasured"]


def test_a_class_that_a_source_lacks_is_of_the_others() -> None:
    labels = np.array([1, 1, 0, 0, 1, 1])
    sources = np.array(["a", "a", "a", "a", "b", "b"], dtype=object)
    weights = source_weights(labels, sources, [SourceShare(source="b", share=0.75)])
    np.testing.assert_allclose(weights, [0.5, 0.5, 1, 1, 1.5, 1.5])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([("c", 0.5)], 'no image of VAL_TEST is of "c"; there are a, b'),
        ([("a", 0.5), ("b", 0.2)], "leave 0.3 for other sources; there are none"),
        ([("b", 1.0)], "no image with label 0 is of a source with a share"),
    ],
)
def test_shares_that_do_not_fit_the_sources(shares: list[tuple[str, float]], message: str) -> None:
    labels = np.array([1, 0, 1, 1])
    sources = np.array(["a", "a", "b", "b"], dtype=object)
    wanted = [SourceShare(source=name, share=share) for name, share in shares]
    with pytest.raises(UserError, match=message):
        source_weights(labels, sources, wanted)


def test_shares_are_checked_when_parameters_are_read() -> None:
    twice = [{"source": "a", "share": 0.2}] * 2
    with pytest.raises(ValueError, match="names a source twice"):
        Challenge(source_shares=twice)
    with pytest.raises(ValueError, match=r"add up to 1\.2, more than 1"):
        Challenge(source_shares=[{"source": name, "share": 0.6} for name in "ab"])


def test_too_few_groups_give_no_interval() -> None:
    labels, p, index = sample(100, 4)
    report = challenge_report(
        labels, [Served(CROP, p)], index, ONE_SOURCE[: len(labels)], Challenge(**SMALL), 0.5, 3
    ).report
    assert report["interval_method"].startswith("none: rests on 3.7 effective groups (of 4)")
    assert set(report["interval"]["mcc"]) == set()
    assert "low" not in report["reward"]
    json_text(report)


def test_one_class_is_refused(trained: Any, write_split: Any, tmp_path: Path) -> None:
    path = write_split(tmp_path / "val_test.arrow", 4, labels=[1] * 4)
    with pytest.raises(UserError, match="both classes must be present"):
        challenge_split(
            Predictor.load(trained.bundle, "cpu"), open_split("challenge", "val_test", path),
            None, Subnet(), Challenge(**SMALL), 0.5, seed=7, workers=1,
        )  # fmt: skip


def test_a_split_through_a_bundle(
    trained: Any, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    split = open_split("challenge", "val_test", tiny_splits["val_test"])
    settings = Challenge(**SMALL, repeats=2, validators=["crop"])
    subnet = Subnet(validator="crop")
    found = challenge_split(predictor, split, None, subnet, settings, 0.5, seed=7, workers=1)
    assert found.report["skew"] is None
    wrong = []
    for row, name in enumerate(split.ids):
        data = served_jpeg(CROP, split.image(row), 3, challenge_rng(7, name, 3, 1))
        p = predictor(Image.open(io.BytesIO(data)))
        wrong.append((p > 0.5) != split.labels[row])
    # The second repeat of level 3 alone is half of that level's images.
    level = found.report["levels"]["level_3"]
    missed = np.mean(np.array(wrong)[split.labels == 1])
    assert abs(2 * level["fnr"] - missed) <= 1
    assert (2 * level["fnr"] - missed) * (split.labels == 1).sum() == pytest.approx(
        round((2 * level["fnr"] - missed) * (split.labels == 1).sum())
    )
    again = challenge_split(predictor, split, None, subnet, settings, 0.5, seed=7, workers=2)
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


def larger(data: bytes) -> bytes:
    """A picture as it may have come: three times as wide and high, a PNG."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.resize((image.width * 3, image.height * 3)).save(buffer, "PNG")
    return buffer.getvalue()


def originals_of(path: Path, files: dict[str, bytes]) -> Originals:
    write_arrow(path, {"id": [*files], "image": [*files.values()]})
    return open_originals("challenge", path)


def test_what_is_sent_are_the_files_that_were_kept(
    trained: Any, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    split = open_split("challenge", "val_test", tiny_splits["val_test"])
    rows = [row for row in range(len(split)) if row % 3]
    files = {str(split.ids[row]): larger(split.image_bytes(row)) for row in rows}
    originals = originals_of(tmp_path / "originals.arrow", files)
    settings = Challenge(**SMALL, repeats=2, validators=["crop", "raw"])
    found = challenge_split(
        predictor, split, originals, Subnet(validator="raw"), settings, 0.5, seed=7, workers=1
    ).report
    assert found["n"] == len(rows)
    assert list(found["validators"]) == ["raw", "crop"]
    # The whole picture is sent once, whatever the repeats.
    assert found["challenges_scored"] == len(rows) * (1 + 4 * 2)
    tasks = [Task(name, data) for name, data in files.items()]
    sent = np.array(
        [predictor(Image.open(io.BytesIO(data))) for data in served_jpegs(RAW, tasks, [0], 1, 7)]
    )
    stored = np.array([predictor(split.image(row)) for row in rows])
    labels = split.labels[rows]
    missed = (sent[labels == 1] <= 0.5).mean()
    assert found["validators"]["raw"]["fnr"] == pytest.approx(missed)
    assert found["skew"] == pytest.approx(skew_report(labels, sent, stored, 0.5), abs=1e-5)
    assert found["skew"]["mean_difference"] > 0


def test_without_kept_files_the_stored_copies_are_sent(
    trained: Any, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    split = open_split("challenge", "val_test", tiny_splits["val_test"])
    arguments = (Subnet(), Challenge(**SMALL, validators=[]), 0.5)
    path = tmp_path / "none.arrow"
    with pa.ipc.new_file(path, ORIGINALS_SCHEMA):
        pass
    none = open_originals("challenge", path)
    found = challenge_split(predictor, split, none, *arguments, seed=7, workers=1).report
    assert found["n"] == len(split)
    assert found["skew"] is None


def test_files_of_another_split_are_refused(
    trained: Any, tiny_splits: dict[str, Path], tmp_path: Path
) -> None:
    split = open_split("challenge", "val_test", tiny_splits["val_test"])
    originals = originals_of(tmp_path / "originals.arrow", {"other": split.image_bytes(0)})
    with pytest.raises(UserError, match="file of other, which is not in VAL_TEST; rerun `prepare`"):
        challenge_split(
            Predictor.load(trained.bundle, "cpu"), split, originals, Subnet(), Challenge(**SMALL), 0.5,
            seed=7, workers=1,
        )  # fmt: skip
