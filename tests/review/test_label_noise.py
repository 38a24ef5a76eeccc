"""Doubtful labels: confident learning by hand, wrong labels planted in a real run, what is warned of."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cleanlab.filter import find_label_issues
from PIL import Image

from streetvision import cli
from streetvision.bundle.predictor import Predictor
from streetvision.core.errors import UserError
from streetvision.core.params import ViewGrid
from streetvision.data.embeddings import write_embeddings
from streetvision.data.store import CONTRACT, open_split
from streetvision.decision.inputs import sigmoid
from streetvision.models.multiview import score_split_views
from streetvision.review.label_noise import (
    Labelled,
    describe,
    find_doubts,
    out_of_group_probability,
    read_predictions,
)
from tests.review.pictures import encoded, plain, rewrite


def labelled(labels: list[int], probability: list[float]) -> Labelled:
    names = np.array([f"i{row}" for row in range(len(labels))], dtype=object)
    return Labelled(names, names, np.array(labels), np.array(probability))


def test_confident_learning_by_hand() -> None:
    """Threshold of a class: its mean probability among the images that are labelled so."""
    given = labelled(
        [1, 1, 1, 1, 0, 0, 0, 0],
        # Mean of roadwork 0.70; of none, 1 - p, 0.70.
        [0.95, 0.90, 0.85, 0.10, 0.05, 0.10, 0.30, 0.75],
    )
    doubts = find_doubts(given)
    # Row 3 is none with 0.90 >= 0.70, row 7 roadwork with 0.75 >= 0.70; row 6 agrees with its label.
    assert doubts.issue.tolist() == [False] * 3 + [True] + [False] * 3 + [True]
    np.testing.assert_allclose(doubts.quality, [0.95, 0.9, 0.85, 0.1, 0.95, 0.9, 0.7, 0.25])
    assert doubts.order[:2].tolist() == [3, 7]
    assert describe(doubts)[0] == "2 of 8 labels (25.0%) are doubtful: 1 of 4 roadwork, 1 of 4 none"


def test_confident_learning_against_the_paper_and_cleanlab() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    probability = sigmoid(2 * (2 * labels - 1) + rng.normal(0, 1.5, 300))
    labels[rng.choice(300, 15, replace=False)] ^= 1
    both = np.stack([1 - probability, probability], axis=1)
    thresholds = [both[labels == c, c].mean() for c in (0, 1)]
    expected = np.zeros(300, dtype=bool)
    for row in range(300):
        passed = [c for c in (0, 1) if both[row, c] >= thresholds[c]]
        best = max(passed, key=lambda c: both[row, c], default=labels[row])
        expected[row] = best != labels[row]
    doubts = find_doubts(labelled(labels.tolist(), probability.tolist()))
    assert expected.sum() > 10
    np.testing.assert_array_equal(doubts.issue, expected)
    cleanlabs = find_label_issues(
        labels, both, filter_by="confident_learning", return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )  # fmt: skip
    np.testing.assert_array_equal(doubts.order[: expected.sum()], cleanlabs)


def test_no_image_is_judged_by_its_own_group() -> None:
    """A feature that tells the label within a group only is worth nothing outside of it."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10).astype(str).astype(object)
    labels = rng.integers(0, 2, 400)
    code = rng.normal(size=(40, 8)).repeat(10, axis=0)  # a direction of the group's own
    features = np.concatenate([code * (2 * labels - 1)[:, None], code], axis=1).astype(np.float32)
    probability = out_of_group_probability(features, labels, groups)
    assert abs(np.corrcoef(probability, labels)[0, 1]) < 0.2
    with pytest.raises(UserError, match="folds of whole groups need at least 2 groups"):
        out_of_group_probability(features, labels, np.full(400, "one", dtype=object))


def test_without_cleanlab_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(UserError, match=r"pip install 'streetvision\[review\]'"):
        find_doubts(labelled([0, 1], [0.1, 0.9]))


def test_one_class_has_no_doubts() -> None:
    with pytest.raises(UserError, match="all 2 labels are the same"):
        find_doubts(labelled([1, 1], [0.1, 0.9]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,group,label\na,g,1\n", "has no rows with a column pipeline or probability"),
        ("id,label,probability\na,1,0.5\n", "has no column group"),
        ("", "has no column id, group, label"),
        ("id,group,label,probability\na,g,2,0.5\n", "line 2: label must be 0 or 1"),
        ("id,group,label,probability\na,g,1,0.5\nb,g,1,x\n", r"line 3: .* got '1' and 'x'"),
        ("id,group,label,probability\na,g,1,nan\n", "line 2"),
    ],
)
def test_predictions_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_predictions(tmp_path / "p.csv")


def test_groups_and_labels_are_read_as_those_of_a_source(tmp_path: Path) -> None:
    text = (
        "id,group,label,probability\na,1.0,1.0,0.9\nb,1,Roadwork,0.8\nc,nan,None,0.1\nd,,no,0.2\n"
    )
    (tmp_path / "p.csv").write_text(text.replace("None", "no roadwork"))
    found = read_predictions(tmp_path / "p.csv")
    assert found.groups.tolist() == ["1", "1", "image:c", "image:d"]
    assert found.labels.tolist() == [1, 1, 0, 0]


def flipped(path: Path, write_split: Callable[..., Path], n: int, **more: Any) -> set[str]:
    """Write a split of plain scenes, one in twenty with the other class's label; returns their ids."""
    write_split(path, n, **more)
    rng = np.random.default_rng(n + more["seed"])
    labels = open_split("evaluate", "val_test", path).labels
    images = {row: encoded(plain(rng, (48, 32), labels[row])) for row in range(n)}
    chosen = rng.choice(n, n // 20, replace=False)
    rewrite(path, images, {int(row): 1 - int(labels[row]) for row in chosen})
    return {f"{path.stem}-{row:04d}" for row in chosen}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_wrong_labels_come_first(
    tmp_path: Path,
    trained: Any,
    write_split: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """5 % wrong: among the 10 % that are ranked first are at least 8 of 10; chance would bring one."""
    data = tmp_path / "mine.arrow"
    wrong = flipped(data, write_split, 200, seed=21, groups=20)
    before = data.read_bytes()
    monkeypatch.chdir(tmp_path)
    command = ["label-noise", str(data), "--bundle", str(trained.bundle), "--images", "6"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "labels (" in shown
    assert "WARNING" not in shown
    rows = read(tmp_path / "report/label_noise.csv")
    assert list(rows[0]) == ["rank", "id", "group", "label", "probability", "quality", "issue"]
    assert [int(row["rank"]) for row in rows] == list(range(1, 201))
    assert len({row["id"] for row in rows[:20]} & wrong) >= 8
    found = {row["id"] for row in rows if row["issue"] == "1"}
    assert len(found & wrong) >= 5
    assert len(found - wrong) <= 2
    with Image.open(tmp_path / "report/label_noise.png") as picture:
        assert picture.height > 300  # two rows of images
    assert data.read_bytes() == before


def test_the_projects_embeddings_are_the_default(
    tmp_path: Path,
    trained: Any,
    write_split: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["label-noise"]) == 2
    assert "the stage `embed` makes it" in capsys.readouterr().err
    wrong: set[str] = set()
    for seed, name in enumerate(CONTRACT["embed"]):
        path = tmp_path / f"data/splits/{name}.arrow"
        wrong |= flipped(path, write_split, 80, seed=seed, groups=8, fusion_groups=4)
        split = open_split("embed", name, path)
        scores = score_split_views(
            predictor.model, predictor.config.preprocessing, split, ViewGrid(), 16,
            torch.device("cpu"),
        )  # fmt: skip
        write_embeddings(tmp_path / f"data/embeddings/{name}.arrow", split, ("global",), scores)
    assert cli.main(["label-noise", "--output", "out"]) == 0
    rows = read(tmp_path / "out/label_noise.csv")
    ids = {row["id"] for row in rows}
    assert len(ids) == 40 + 80 + 80  # TRAIN's fusion part alone
    wrong &= ids
    assert len({row["id"] for row in rows[: len(rows) // 10]} & wrong) >= 0.7 * len(wrong)
    shown = capsys.readouterr().out
    assert "WARNING" not in shown
    assert "not found" not in shown


def test_predictions_and_the_splits_that_need_care(
    tmp_path: Path,
    trained: Any,
    write_split: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    test = write_split(tmp_path / "data/splits/val_test.arrow", 20)
    train = write_split(tmp_path / "data/splits/train.arrow", 60, fusion_groups=2)
    split = open_split("evaluate", "val_test", test)
    lines = ["id,group,label,pipeline,baseline"]
    for row, (name, label) in enumerate(zip(split.ids, split.labels, strict=True)):
        p = 0.9 if (label == 1) != (row == 3) else 0.1
        lines.append(f"mine/{name},{split.groups[row]},{label},{p},0.5")
    (tmp_path / "p.csv").write_text("\n".join(lines) + "\n")
    assert cli.main(["label-noise", "--predictions", "p.csv"]) == 0
    shown = capsys.readouterr().out
    assert "WARNING: 20 of these labels are VAL_TEST's" in shown
    assert "learned by heart" not in shown
    assert "not found" not in shown
    assert read(tmp_path / "report/label_noise.csv")[0]["id"] == f"mine/{split.ids[3]}"
    assert cli.main(["label-noise", str(train), "--bundle", str(trained.bundle)]) == 0
    shown = capsys.readouterr().out
    assert "WARNING: 44 of these images trained the backbone" in shown
    (tmp_path / "data/splits/val_test.arrow").unlink()
    assert cli.main(["label-noise", "--predictions", "p.csv"]) == 0
    assert "20 pictures of the contact sheet were not found" in capsys.readouterr().out
    assert cli.main(["label-noise", "--images", "0"]) == 2
