"""Drift: each statistic against a slow or published one, false alarms and power by simulation, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binom, ks_2samp

from streetvision import cli
from streetvision.bundle.predictor import Predictor
from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, ViewGrid
from streetvision.data.embeddings import read_embeddings, write_embeddings
from streetvision.data.store import open_split
from streetvision.data.transforms import Preprocessing
from streetvision.data.views import view_names
from streetvision.decision.hard_images import HardImages
from streetvision.decision.inputs import sigmoid
from streetvision.fusion.fusion import Fusion, FusionConfig
from streetvision.models.multiview import score_split_views
from streetvision.review.drift import (
    holm,
    kernel_sums,
    ks_distance,
    match_groups,
    median_distance,
    mmd2,
    mmd_test,
    psi,
    shuffle_groups,
    shuffle_test,
)
from streetvision.review.drift_report import TESTS, drift_report, psi_level, render
from streetvision.review.images import Sample, embedded_sample, look, open_images, score_images
from streetvision.subnet.profiles import CROP
from streetvision.subnet.served import Task, served_jpegs

Floats = NDArray[np.float64]
HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(32, 48, "letterbox", mean=HALF, std=HALF)


# --------------------------------------------------------------------------- statistics


def test_psi_by_hand() -> None:
    """Ten bins of ten reference images; the new ones all lie in the last."""
    reference = np.arange(100.0)
    p = np.full(10, 10.5 / 105)
    q = np.array([0.5] * 9 + [50.5]) / 55
    assert psi(reference, np.full(50, 99.0)) == pytest.approx(((q - p) * np.log(q / p)).sum())
    assert psi(reference, reference) == 0


def test_psi_of_few_values_sees_what_lies_between_and_beyond() -> None:
    constant = np.ones(50)
    assert psi(constant, constant) == 0
    for value in (0.5, 1.5):
        assert psi(constant, np.full(50, value)) > 5
    assert psi(np.tile([1.0, 2.0], 25), np.full(50, 1.5)) > 5


def test_psi_without_drift_is_as_large_as_published() -> None:
    rng = np.random.default_rng(0)
    found = [psi(rng.normal(size=300), rng.normal(size=200)) for _ in range(300)]
    assert np.mean(found) == pytest.approx(9 * (1 / 300 + 1 / 200), rel=0.1)


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=20),
    st.lists(st.integers(0, 9), min_size=2, max_size=20),
)
def test_ks_distance_is_scipys(a: list[int], b: list[int]) -> None:
    expected = ks_2samp(np.array(a), np.array(b), method="asymp").statistic
    assert ks_distance(np.array(a, float), np.array(b, float)) == pytest.approx(expected)


def slow_mmd2(x: Floats, groups: list[int], new: list[bool], sigma: float) -> float:
    """Means over pairs of different groups, or of different images where a sample has one group."""
    n = len(x)
    kernel = [
        [np.exp(-((x[i] - x[j]) ** 2).sum() / 2 / sigma**2) for j in range(n)] for i in range(n)
    ]

    def within(rows: list[int]) -> float:
        one = len({groups[i] for i in rows}) == 1
        return float(
            np.mean(
                [
                    kernel[i][j]
                    for i, j in product(rows, rows)
                    if i != j and (one or groups[i] != groups[j])
                ]
            )
        )

    first = [i for i in range(n) if not new[groups[i]]]
    second = [i for i in range(n) if new[groups[i]]]
    across = float(np.mean([kernel[i][j] for i, j in product(first, second)]))
    return within(first) + within(second) - 2 * across


@pytest.mark.parametrize(
    ("groups", "new"),
    [
        ([0, 1, 2, 3, 4, 5, 6], [True, False, True, False, False, True, False]),
        ([0, 0, 1, 2, 2, 2, 3, 1], [True, False, True, False]),
        ([0, 0, 0, 1, 2, 2, 1], [True, False, False]),
    ],
)
def test_mmd2_is_the_slow_one(groups: list[int], new: list[bool]) -> None:
    x = np.random.default_rng(1).normal(size=(len(groups), 3))
    codes = np.array(groups)
    sums, own = kernel_sums(x.astype(np.float32), codes, 1.3)
    found = mmd2(sums, own, np.bincount(codes).astype(float), np.array([new, new]))
    expected = slow_mmd2(x.astype(np.float32).astype(float), groups, new, 1.3)
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_judged_mmd2_is_that_of_the_two_samples_in_any_order_of_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(14, 3)).astype(np.float32)
    groups = rng.permutation(np.array(list("aabbbcddddefff"), object))
    first, second = groups[:8], np.char.add("new ", groups[8:].astype(str)).astype(object)
    shuffles = shuffle_groups(first, second, 9, rng)
    found = mmd_test(x[:8], x[8:], shuffles, np.random.default_rng(0))
    sigma = median_distance(x, np.random.default_rng(0))
    codes, new = shuffles.codes.tolist(), [False] * (shuffles.codes.max() + 1)
    for code in codes[8:]:
        new[code] = True
    assert found.value == pytest.approx(slow_mmd2(x.astype(float), codes, new, sigma), abs=1e-9)


def test_mmd2_is_unbiased_with_groups() -> None:
    """Images of a group are much alike; the mean over many samples of one distribution is still 0."""
    rng = np.random.default_rng(2)
    codes = np.repeat(np.arange(12), 5)
    new = np.arange(12) >= 8
    found = []
    for _ in range(400):
        x = rng.normal(size=(12, 2)).repeat(5, axis=0) + 0.1 * rng.normal(size=(60, 2))
        sums, own = kernel_sums(x.astype(np.float32), codes, 1.5)
        found.append(mmd2(sums, own, np.full(12, 5.0), new[None])[0])
    assert abs(np.mean(found)) < 3 * np.std(found) / 20


def test_the_median_distance_of_equal_images_is_usable() -> None:
    rng = np.random.default_rng(0)
    assert median_distance(np.ones((5, 2), np.float32), rng) == 1
    points = np.array([[0.0], [1.0], [3.0]], np.float32)
    assert median_distance(points, rng) == pytest.approx(2)


def test_shuffles_keep_groups_whole_and_their_number() -> None:
    reference, new = np.array(list("aabbbc"), object), np.array(list("addd"), object)
    shuffles = shuffle_groups(reference, new, 500, np.random.default_rng(0))
    assert shuffles.codes.tolist() == [0, 0, 1, 1, 1, 2, 3, 4, 4, 4]  # a and a are two groups
    assert (shuffles.new.sum(axis=1) == 2).all()
    assert len(np.unique(shuffles.new, axis=0)) == 10  # all of 5 over 2


def test_matched_groups_are_equally_large() -> None:
    rng = np.random.default_rng(0)
    reference = np.repeat(list("abcdef"), [50, 40, 40, 30, 20, 7]).astype(object)
    new = np.repeat(list("xyz"), [10, 60, 30]).astype(object)
    kept = match_groups(reference, new, rng)
    for groups, rows in zip((reference, new), kept, strict=True):
        assert len(set(rows.tolist())) == len(rows)
        assert set(groups[rows]) == set(groups)
    sizes = [
        sorted(np.unique(groups[rows], return_counts=True)[1].tolist())
        for groups, rows in zip((reference, new), kept, strict=True)
    ]
    # Thirds of the new ones: 10, 30, 60; of the reference's: 7 and 20, 30 and 40, 40 and 50.
    assert sizes == [[7, 10, 30, 30, 40, 50], [7, 30, 40]]
    same = match_groups(reference, reference, rng)
    assert all(len(rows) == len(reference) for rows in same)
    alone = np.arange(500).astype(str).astype(object)
    assert [len(rows) for rows in match_groups(reference, alone, rng)] == [6, 500]


def test_p_counts_the_shuffles_that_reach_the_value() -> None:
    """Of the 6 ways to take 2 of 4 images for new, 2 have a mean distance of 2 (0, 1 | 2, 3)."""
    values = np.arange(4.0)
    ids = np.array(list("abcd"), object)
    shuffles = shuffle_groups(ids[:2], ids[2:], 3000, np.random.default_rng(0))
    found = shuffle_test(lambda a, b: abs(b.mean() - a.mean()), values[:2], values[2:], shuffles)
    assert found.value == 2
    assert found.chance == 2
    assert found.p == pytest.approx(1 / 3, abs=0.03)


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []


# --------------------------------------------------------------------------- the verdict


def drawn(
    rng: np.random.Generator,
    n_groups: int,
    size: int | tuple[int, int],
    shift: float = 0.0,
    spread: float = 1.0,
) -> Sample:
    """Logits and features with effects of groups as large as those of images, rows in any order.

    `size` images a group, or least and most.
    """
    low, high = (size, size) if isinstance(size, int) else size
    codes = np.arange(n_groups).repeat(rng.integers(low, high + 1, n_groups))
    rng.shuffle(codes)
    n = len(codes)
    place = (spread * rng.normal(size=(n_groups, 3)))[codes]
    features = (place + rng.normal(size=(n, 3)) + shift).astype(np.float32)
    groups = codes.astype(str).astype(object)
    return Sample(np.arange(n).astype(str).astype(object), groups, features[:, 0] * 2.0, features)


def compare(reference: Sample, new: Sample, permutations: int = 99, **more: Any) -> dict[str, Any]:
    return drift_report(reference, new, sigmoid, None, permutations=permutations, **more)


@pytest.mark.parametrize(
    ("sizes", "n_groups", "spread"),
    [
        ((6, 6), (15, 9), 1.0),
        ((1, 1), (60, 40), 1.0),
        ((24, 3), (20, 5), 0.2),
        (((30, 60), (10, 20)), (15, 5), 1.0),
        (((5, 60), (10, 20)), (12, 12), 0.5),
    ],
)
def test_false_alarms_are_as_rare_as_promised(
    sizes: tuple[int | tuple[int, int], ...], n_groups: tuple[int, int], spread: float
) -> None:
    """With groups, without, and where the new ones are small; tests of single images alarm far too often."""
    rng = np.random.default_rng(3)
    alarms, independent, n = 0, 0, 120
    single = np.zeros(len(TESTS))
    for seed in range(n):
        samples = [drawn(rng, *each, spread=spread) for each in zip(n_groups, sizes, strict=True)]
        report = compare(samples[0], samples[1], seed=seed)
        alarms += report["drift"]
        single += [report["tests"][name]["p"] <= 0.05 for name in TESTS]
        independent += report["ks_logit_p_independent"] <= 0.05
    # One such case in 100 lies above, whatever the method; Holm's three tests each keep the level, too.
    assert alarms <= binom.ppf(0.99, n, 0.05)
    assert (single <= binom.ppf(0.997, n, 0.05)).all()
    if spread == 1 and sizes != (1, 1):
        assert independent / n > 0.15


def test_a_shift_is_found_and_sized() -> None:
    rng = np.random.default_rng(0)
    found = [
        compare(drawn(rng, 20, 5), drawn(rng, 15, 5, shift=1.5), seed=seed) for seed in range(20)
    ]
    assert np.mean([each["drift"] for each in found]) > 0.9
    assert found[0]["size"] == "large"
    assert "label some" in found[0]["meaning"]


def test_features_that_drift_alone_leave_the_answers_small() -> None:
    rng = np.random.default_rng(1)
    reference = drawn(rng, 30, 4, spread=0.1)
    new = replace(reference, features=reference.features + np.float32([0, 2, 0]))
    report = compare(reference, new)
    assert report["drift"]
    assert (
        report["tests"]["mmd2_features"]["p_holm"] <= 0.05 < report["tests"]["ks_logit"]["p_holm"]
    )
    assert report["size"] == "small"
    assert report["meaning"].startswith(
        "DRIFT in what the images show; a shift of the answers could"
    )


def test_one_group_can_never_alarm_and_it_says_so() -> None:
    rng = np.random.default_rng(0)
    report = compare(drawn(rng, 10, 20), drawn(rng, 1, 20, shift=20), permutations=400)
    assert not report["decidable"]
    assert not report["drift"]
    assert report["smallest_p"] == pytest.approx(1 / 11)
    assert report["meaning"].startswith("Undecided: 1 group of new images")


def test_the_band_and_the_properties_are_compared() -> None:
    rng = np.random.default_rng(0)
    samples = []
    for shift in (0.0, 4.0):
        sample = drawn(rng, 20, 3)
        sample.properties["dark"] = rng.normal(size=60) + shift
        sample.properties["same"] = np.ones(60)
        samples.append(sample)
    report = drift_report(
        samples[0], samples[1], sigmoid, lambda z: np.abs(z) > 1, permutations=200
    )
    for name, sample in zip(("reference", "new"), samples, strict=True):
        expected = np.mean(np.abs(sample.logits) <= 1)
        assert report["share_rejected"][name] == pytest.approx(expected)
    assert report["properties"]["dark"]["p_holm"] < 0.05
    assert report["properties"]["same"]["psi"] == 0
    shown = render(report | {"sources": {"reference": "a.arrow", "new": "b"}})
    assert "reference: 60 images of 20 groups, a.arrow" in shown
    assert f"PSI of all images: {report['psi']:.3f}, {report['size']} (below 0.1 small" in shown
    assert "rejected by the policy" in shown
    assert shown.count("\n") > 10
    # Properties explain, they do not alarm.
    assert report["drift"] == (min(t["p_holm"] for t in report["tests"].values()) <= 0.05)


@pytest.mark.parametrize(("value", "level"), [(0.0, "small"), (0.1, "moderate"), (0.25, "large")])
def test_levels(value: float, level: str) -> None:
    assert psi_level(value) == level


# --------------------------------------------------------------------------- images


def test_looks_tell_dark_flat_grey_and_blurred() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    sharp = look(Image.fromarray(pixels), PREPROCESSING)
    small = Image.fromarray(pixels).resize((12, 8), Image.Resampling.BOX)
    for index, other in enumerate(
        (
            Image.fromarray(pixels // 2),
            Image.fromarray(pixels // 2 + 64),
            Image.fromarray(pixels).convert("L").convert("RGB"),
            small.resize((48, 32)),
        )
    ):
        assert look(other, PREPROCESSING)[index] < 0.8 * sharp[index] - (index == 3)
    grey = Image.new("RGB", (48, 32), (51, 51, 51))
    assert look(grey, PREPROCESSING)[:3] == pytest.approx((0.2, 0, 0))
    # The border that fills a wide image up is not looked at.
    assert look(grey.resize((48, 16)), PREPROCESSING) == pytest.approx(look(grey, PREPROCESSING))


def test_a_folder_without_labels_is_read_by_groups(
    tmp_path: Path, write_split: Callable[..., Path]
) -> None:
    split = open_split("evaluate", "val_test", write_split(tmp_path / "x.arrow", 6))
    for row in range(6):
        path = tmp_path / "new" / f"drive{row % 2}" / "deep" / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(split.image_bytes(row))
    (tmp_path / "new/alone.jpg").write_bytes(split.image_bytes(0)[:-200] + b"\xff\xd9")
    with open_images(tmp_path / "new", PREPROCESSING) as images:
        assert {str(name) for name in images.groups} >= {"drive1"}
        assert {"images/drive0/deep/0.jpg", "images/drive1/deep/5.jpg"} <= set(images.ids)


def test_a_sample_has_the_logits_that_the_policy_takes(
    tmp_path: Path, trained: Any, write_split: Callable[..., Path]
) -> None:
    """Several views and a second pass for hard images: as the predictor answers, cached or not."""
    plain = Predictor.load(trained.bundle, "cpu")
    grid = ViewGrid(grid=2)
    fusion = Fusion(FusionConfig.of("simple_mean", Cvfm(), grid, 0))
    split = open_split("evaluate", "val_test", write_split(tmp_path / "x.arrow", 24))
    images = [split.image(row) for row in range(24)]
    middle = np.quantile(plain.logits(images), [0.3, 0.7])
    policy = replace(plain.policy, hard_images=HardImages(*middle.tolist()))
    predictor = Predictor(plain.model, plain.config, fusion, policy, 16, torch.device("cpu"))
    expected = predictor.logits(images)
    scored = score_images(predictor, split)
    np.testing.assert_allclose(scored.logits, expected, atol=1e-5)
    assert (np.abs(expected - plain.logits(images)) > 1e-3).any()
    scores = score_split_views(
        predictor.model, predictor.config.preprocessing, split, grid, 16, torch.device("cpu")
    )
    path = write_embeddings(tmp_path / "e.arrow", split, view_names(grid), scores)
    cached = embedded_sample(predictor, read_embeddings(path, features=True), split)
    np.testing.assert_allclose(cached.logits, expected, atol=1e-5)
    np.testing.assert_array_equal(cached.features, scored.features)
    for name, values in scored.properties.items():
        np.testing.assert_array_equal(cached.properties[name], values)
    with pytest.raises(UserError, match="embeddings and images of val_test differ"):
        embedded_sample(predictor, read_embeddings(path, features=True), split.select([0, 1]))


# --------------------------------------------------------------------------- the command


@pytest.fixture
def project(
    tmp_path: Path, trained: Any, write_split: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A project with VAL_CALIB's images and their embeddings."""
    predictor = Predictor.load(trained.bundle, "cpu")
    path = write_split(tmp_path / "data/splits/val_calib.arrow", 120, seed=11, groups=20)
    split, grid = open_split("embed", "val_calib", path), ViewGrid()
    scores = score_split_views(
        predictor.model, predictor.config.preprocessing, split, grid, 16, torch.device("cpu")
    )
    write_embeddings(tmp_path / "data/embeddings/val_calib.arrow", split, ("global",), scores)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_clean_images_pass_and_distorted_ones_alarm(
    project: Path,
    trained: Any,
    write_split: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fresh = write_split(project / "fresh.arrow", 90, seed=12, groups=15)
    command = ["drift", str(trained.bundle), str(fresh)]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((project / "report/drift.json").read_text())
    assert not report["drift"]
    assert report["decidable"]
    assert report["images"] == {"reference": 120, "new": 90}
    assert report["groups"] == {"reference": 20, "new": 15, "known": True}
    assert set(report["properties"]) >= {"brightness", "sharpness", "megapixels"}
    assert (project / "report/drift.png").read_bytes().startswith(b"\x89PNG")

    # The same images through the validator's distortions, in a folder without labels.
    split = open_split("evaluate", "val_test", fresh)
    tasks = [Task(str(name), split.image_bytes(row)) for row, name in enumerate(split.ids)]
    for row, jpeg in enumerate(served_jpegs(CROP, tasks, [3], 1, seed=0, workers=0)):
        path = project / "served" / str(split.groups[row]) / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
    command = ["drift", str(trained.bundle), str(project / "served"), "--output", "out"]
    assert cli.main(command) == 3
    shown = capsys.readouterr().out
    assert "\nDRIFT, " in shown
    report = json.loads((project / "out/drift.json").read_text())
    assert report["properties"]["sharpness"]["p_holm"] < 0.05
    # Images as the reference instead of embeddings: nothing changes for what drifts.
    command += ["--reference", str(project / "data/splits/val_calib.arrow")]
    assert cli.main(command) == 3
    again = json.loads((project / "out/drift.json").read_text())
    for name, test in report["tests"].items():
        assert again["tests"][name]["value"] == pytest.approx(test["value"], abs=2e-3)


def test_mistakes_of_the_user(
    project: Path,
    trained: Any,
    write_split: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fresh = write_split(project / "fresh.arrow", 12)
    (project / "empty").mkdir()
    command = ["drift", str(trained.bundle)]
    for more, message in (
        ([str(project / "empty")], "holds no image; JPEG, "),
        ([str(project / "nowhere")], "does not exist"),
        ([str(fresh), "--alpha", "2"], "--alpha is 2; it must be between 0 and 1"),
        ([str(fresh), "--reference", "gone.arrow"], "gone.arrow is missing"),
    ):
        assert cli.main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    path = project / "data/embeddings/val_calib.arrow"
    split = open_split("embed", "val_calib", project / "data/splits/val_calib.arrow")
    predictor = Predictor.load(trained.bundle, "cpu")
    torch.nn.init.normal_(predictor.model.head.weight)
    scores = score_split_views(
        predictor.model, predictor.config.preprocessing, split, ViewGrid(), 16, torch.device("cpu")
    )
    write_embeddings(path, split, ("global",), scores)
    assert cli.main([*command, str(fresh)]) == 2
    assert "made by another classifier" in capsys.readouterr().err
