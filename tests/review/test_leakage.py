"""Leakage: neighbours against the slow search, chance by simulation, planted copies through the command."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from streetvision import cli
from streetvision.bundle.predictor import Predictor
from streetvision.core.errors import UserError
from streetvision.data.store import open_split
from streetvision.prepare.duplicates import normalised_thumbnails, perceptual_hashes, pixel_error
from streetvision.review.leakage import (
    Looked,
    early_features,
    expected_by_chance,
    find_leakage,
    nearest,
    smallest_of_groups,
    whitened,
)
from streetvision.review.leakage_report import describe
from tests.review.pictures import encoded, rewrite, scenes, street

SIZE = (128, 96)


def unit(rng: np.random.Generator, n: int, width: int = 6) -> NDArray[np.float32]:
    x = rng.normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_neighbours_are_those_of_the_slow_search() -> None:
    rng = np.random.default_rng(0)
    queries, pool = unit(rng, 1100), unit(rng, 70)
    pool_groups, query_groups = rng.integers(0, 5, 70), rng.integers(0, 5, 1100)
    for groups in (None, query_groups):
        found = nearest(queries, pool, pool_groups, groups)
        for row in range(0, 1100, 37):
            d = np.linalg.norm(queries[row].astype(float) - pool, axis=1)
            if groups is not None:
                d[pool_groups == groups[row]] = np.inf
            best = int(d.argmin())
            others = d[pool_groups != pool_groups[best]].min()
            assert found.rows[row] == best
            assert found.distance[row] == pytest.approx(d[best], abs=1e-6)
            assert found.next_group[row] == pytest.approx(others, abs=1e-5)
            assert found.ratio[row] == pytest.approx(d[best] / others, abs=1e-5)


def test_without_another_group_there_is_no_ratio() -> None:
    rng = np.random.default_rng(0)
    x, one = unit(rng, 5), np.zeros(5, np.int64)
    assert np.isinf(nearest(x, x, one, one).ratio).all()
    found = nearest(x, x, one)
    assert np.isinf(found.ratio).all()
    assert found.distance == pytest.approx(0, abs=1e-6)


def test_whitened_directions_weigh_the_same() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(5, 5)) * np.array([100, 10, 1, 1, 1])
    parts = [(rng.normal(size=(n, 5)) @ mix).astype(np.float32) for n in (800, 400)]
    parts = [np.concatenate([p, np.ones((len(p), 1), np.float32)], axis=1) for p in parts]
    made = np.concatenate(whitened(parts))
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-5)
    spread = np.linalg.eigvalsh(np.cov(made.T))
    before = np.linalg.eigvalsh(np.corrcoef(np.concatenate(parts)[:, :5].T))
    assert spread.max() / spread.min() < before.max() / before.min() / 5
    with pytest.raises(UserError, match="all images are alike"):
        whitened([np.ones((3, 2), np.float32)] * 2)


def test_expected_is_the_rank_above_and_a_power_below() -> None:
    known = np.sort(np.random.default_rng(0).random(4000) ** (1 / 8))  # P(ratio < r) = r^8
    found = expected_by_chance(np.array([0.3, 0.5, 0.9, 1.0]), known, 1000)
    # On the safe side where it is continued: by a power some 10 % smaller than 8.
    power = np.log(found[:2] / 1000) / np.log([0.3, 0.5])
    assert ((power > 6) & (power < 8)).all()
    np.testing.assert_allclose(found[2:], 1000 * np.array([0.9, 1.0]) ** 8, rtol=0.05)
    assert np.isinf(expected_by_chance(np.array([0.0]), known[:19], 10)).all()
    assert expected_by_chance(np.array([0.0]), known, 10) < 1e-9
    # Copies within the split itself hardly make it blind.
    known[:20] = 0
    assert expected_by_chance(np.array([0.1]), known, 1000) < 0.01


@pytest.mark.parametrize(
    ("within", "size", "equal"),
    [(0.7, 8, True), (0.1, 8, True), (0.02, 8, True), (0.1, 30, True), (0.1, 8, False)],
)
def test_chance_alone_hardly_ever_alarms(within: float, size: int, equal: bool) -> None:
    """However much the images of a drive look alike: `python -m tests.benchmarks leakage` shows more."""
    rng = np.random.default_rng(3)
    n = 60
    alarms = sum(
        find_leakage(
            [
                scenes(rng, name, g, size, within, equal=equal)
                for name, g in zip("abc", (40, 15, 15), strict=True)
            ],
            6,
            0.04,
        ).alarm
        for _ in range(n)
    )
    assert alarms / n <= 0.05 + 2.33 * np.sqrt(0.05 * 0.95 / n)


@pytest.mark.parametrize("within", [0.7, 0.1])
def test_a_copy_among_drives_that_look_alike_is_found(within: float) -> None:
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(20):
        a, b = scenes(rng, "a", 40, 8, within), scenes(rng, "b", 15, 8, within)
        b.features[7] = a.features[11] + 0.02 * rng.normal(size=a.features.shape[1])
        leaks = find_leakage([a, b], 6, 0.04).leaks
        found += ((0, 11), (1, 7)) in {(pair.first, pair.second) for pair in leaks}
    assert found >= 19


def test_a_group_counts_once_however_many_images_it_has() -> None:
    """Chance is known from groups: the same images in fewer groups say less, so more is expected of it."""
    rng = np.random.default_rng(8)
    many = scenes(rng, "a", 320, 1)
    few = replace(many, groups=np.array([f"a{row // 8}" for row in range(320)], dtype=object))
    b = scenes(rng, "b", 15, 4)
    expected = {}
    for name, a in (("many", many), ("few", few)):
        found = find_leakage([a, b], 6, 0.04)
        assert len(found.baselines[0]) == {"many": 320, "few": 40}[name]
        assert len(found.ratios[0, 1]) == 15
        ratio = np.array([pair.ratio for pair in found.pairs])
        smallest = smallest_of_groups(
            nearest(*(whitened([a.features, b.features])[k] for k in (1, 0)), codes(a)).ratio,
            codes(b),
        )
        np.testing.assert_allclose(found.ratios[0, 1], smallest)
        assert ratio.min() == smallest[0]
        # Groups of four in b against groups of one or eight in a: four times the chance, or no more.
        scale = {"many": 4.0, "few": 1.0}[name]
        expected[name] = scale * expected_by_chance(ratio, found.baselines[0], 15)
        np.testing.assert_allclose([pair.expected for pair in found.pairs], expected[name])


def codes(looked: Looked) -> NDArray[np.int64]:
    return np.unique(looked.groups, return_inverse=True)[1].astype(np.int64)


def test_smallest_of_each_group() -> None:
    ratio = np.array([0.5, 0.2, np.inf, 0.9, 0.1, np.inf])
    found = smallest_of_groups(ratio, np.array([3, 3, 1, 1, 0, 7]))
    assert found.tolist() == [0.1, 0.2, 0.9, np.inf]


def test_planted_copies_are_found_whatever_they_are_alike_in() -> None:
    rng = np.random.default_rng(4)
    a, b, c = (scenes(rng, name, g) for name, g in (("a", 40), ("b", 15), ("c", 15)))
    b.features[7] = a.features[11] + 0.02  # by features
    c.thumbnails[5] = b.thumbnails[9]  # by `prepare`'s rule
    c.groups[:8] = a.groups[0]  # by name
    found = find_leakage([a, b, c], 6, 0.04)
    assert {(pair.first, pair.second) for pair in found.leaks} == {
        ((0, 11), (1, 7)), ((1, 9), (2, 5)),
    }  # fmt: skip
    assert found.pairs[0].duplicate != found.pairs[1].duplicate
    assert found.shared == {(0, 1): [], (0, 2): ["a0"], (1, 2): []}
    assert found.alarm
    assert len(found.pairs) == 120 + 120 + 120 + 1
    with pytest.raises(UserError, match="at least 2 are needed"):
        find_leakage([a], 6, 0.04)


def test_what_cannot_be_told_is_said() -> None:
    rng = np.random.default_rng(6)
    few, b = scenes(rng, "few", 4), scenes(rng, "b", 6)
    b.groups[:] = [f"image:{name}" for name in b.ids]
    found = find_leakage([few, b], 6, 0.04)
    assert not found.leaks
    shown = "\n".join(describe(found))
    assert "Fewer than 20 groups in few, too few to know what chance brings" in shown
    assert "No groups are known in b: frames" in shown
    assert "No leak found" in shown
    b.groups[0] = "few1"
    lines = describe(find_leakage([few, b], 6, 0.04))
    assert lines[-1] == "LEAK: groups are in two splits."
    assert "1 groups are in few and in b: few1" in lines


def test_bits_and_pixels_are_those_of_prepare() -> None:
    rng = np.random.default_rng(5)
    a, b = scenes(rng, "a", 6), scenes(rng, "b", 6)
    pair = find_leakage([a, b], 6, 0.04).pairs[0]
    i, j = pair.first[1], pair.second[1]
    hashes = perceptual_hashes(np.stack([a.thumbnails[i], b.thumbnails[j]]))
    assert pair.hash_bits == int(hashes[0] ^ hashes[1]).bit_count()
    flat, _ = normalised_thumbnails(np.stack([a.thumbnails[i], b.thumbnails[j]]))
    assert pair.pixel_error == pixel_error(flat[:1], flat[1:])[0]


def test_early_features_keep_the_layout(trained: Any) -> None:
    """The mirrored image has the mirrored grid of cells, roughly; the last features would hardly differ."""
    predictor = Predictor.load(trained.bundle, "cpu")
    image = Image.new("RGB", (48, 32), "black")
    image.paste("white", (0, 0, 24, 32))
    found = early_features(predictor, [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    cells = found.reshape(2, -1, 4, 4)
    left, right = cells[0, :, :, 0], cells[1, :, :, 3]
    assert np.abs(left - right).mean() < 0.2 * np.abs(cells[0, :, :, 0] - cells[0, :, :, 3]).mean()


# --------------------------------------------------------------------------- the command


def write_scenes(path: Path, write_split: Callable[..., Path], n: int, seed: int) -> Path:
    """A split whose images are scenes."""
    write_split(path, n, seed=seed, groups=n // 4, size=SIZE)
    rng = np.random.default_rng(seed)
    return rewrite(path, {row: encoded(street(rng, SIZE)) for row in range(n)})


@pytest.fixture
def project(
    tmp_path: Path, write_split: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    for seed, (name, n) in enumerate(
        (("train", 240), ("val_select", 80), ("val_calib", 80), ("val_test", 80))
    ):
        write_scenes(tmp_path / f"data/splits/{name}.arrow", write_split, n, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_splits_without_a_leak_pass_and_planted_copies_come_first(
    project: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["leakage", "--bundle", str(trained.bundle), "--pairs", "3"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "No leak found" in shown
    assert "val_test in val_calib" in shown
    train = open_split("evaluate", "val_test", project / "data/splits/train.arrow")
    width, height = SIZE
    cropped = train.image(5).crop((4, 3, width - 4, height - 3)).resize(SIZE)
    brighter = ImageEnhance.Brightness(train.image(70)).enhance(1.1)
    test = project / "data/splits/val_test.arrow"
    rewrite(test, {9: encoded(cropped, 80), 33: encoded(brighter, 80)})
    assert cli.main([*command, "--output", "out"]) == 3
    shown = capsys.readouterr().out
    assert "LEAK: " in shown
    with (project / "out/leakage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    planted = {("train-0005", "val_test-0009"), ("train-0070", "val_test-0033")}
    assert {(row["first_id"], row["second_id"]) for row in rows[:2]} == planted
    assert [row["leak"] for row in rows[:3]] == ["1", "1", "0"]
    assert {row["first_split"] for row in rows[:2]} == {"train"}
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    with Image.open(project / "out/leakage.png") as picture:
        assert picture.width > 900  # two pairs side by side


def test_any_data_can_be_compared(
    project: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of new images, two of which are in TRAIN already."""
    splits = project / "data/splits"
    new = open_split("evaluate", "val_test", splits / "val_test.arrow")
    old = open_split("evaluate", "val_test", splits / "train.arrow")
    for row in range(40):
        path = project / "new" / f"drive{row // 4}" / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        source = old if row in {3, 30} else new
        path.write_bytes(source.image_bytes(row))
    command = ["leakage", str(splits / "train.arrow"), "new", "--bundle", str(trained.bundle)]
    assert cli.main(command) == 3
    assert "LEAK: 2 pairs" in capsys.readouterr().out
    with (project / "report/leakage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:2]
    assert {row["second_id"] for row in rows} == {"images/drive0/3.jpg", "images/drive7/30.jpg"}
    assert {row["first_id"] for row in rows} == {"train-0003", "train-0030"}
    assert cli.main([*command, "--pairs", "0"]) == 2
    assert cli.main(["leakage", str(splits / "train.arrow"), "--bundle", str(trained.bundle)]) == 2
    assert "at least 2 are needed" in capsys.readouterr().err
