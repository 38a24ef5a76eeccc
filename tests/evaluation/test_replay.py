"""Logged challenges: what a log may hold, the validator's windows over it, and when there is an alarm."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from streetvision import cli
from streetvision.core.errors import UserError
from streetvision.data.store import open_split
from streetvision.evaluation.replay import (
    Challenge,
    alarms,
    answers,
    describe,
    read_log,
    replay,
    windows,
)
from streetvision.subnet.reward import rewards, rolling_metrics

if TYPE_CHECKING:
    from tests.conftest import Trained

Floats = NDArray[np.float64]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images a.png, b.png and broken.png."""
    for name, grey in (("a.png", 200), ("b.png", 20)):
        Image.new("RGB", (20, 20), (grey,) * 3).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def brightness(images: Iterable[Image.Image]) -> Floats:
    """A score that is easy to know: 0.78 for a.png, 0.08 for b.png."""
    return np.array([np.asarray(image).mean() / 255 for image in images])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --------------------------------------------------------------------------- the log


def test_both_forms_say_the_same(folder: Path) -> None:
    text = f"label,image,prediction,uid\n1,a.png,0.9,5\n,b.png,-1,5\n-1,{folder}/a.png,,\n0,b.png,.5,\n"
    lines = [
        {"image": "a.png", "prediction": 0.9, "label": 1, "uid": 5},
        {"image": "b.png", "prediction": -1, "label": None},
        {"image": f"{folder}/a.png", "label": -1},
        {"image": "b.png", "prediction": 0.5, "label": 0},
    ]
    a, b = folder / "a.png", folder / "b.png"
    expected = [
        Challenge(a, 0.9, 1), Challenge(b, -1.0, None), Challenge(a, None, None), Challenge(b, 0.5, 0),
    ]  # fmt: skip
    assert read_log(write(folder / "log.csv", text)) == expected
    joined = "\n\n".join(map(json.dumps, lines))
    assert read_log(write(folder / "log.jsonl", joined)) == expected


@pytest.mark.parametrize(
    "header",
    [
        "image, prediction, label",
        "Image,PREDICTION,Label ",
        ' image ,\tprediction,"label"',
        'image, "prediction",label',
    ],
)
def test_blanks_and_case_of_headers_drop_no_answer(header: str, folder: Path) -> None:
    log = write(folder / "log.csv", f"{header}\na.png, 0.9, 1\nb.png,0.2 ,0\n")
    a, b = Challenge(folder / "a.png", 0.9, 1), Challenge(folder / "b.png", 0.2, 0)
    assert read_log(log) == [a, b]
    rows = [
        {" Image": "a.png", "Prediction ": 0.9, "LABEL": 1},
        {"image": "b.png", "prediction": 0.2, "label": 0},
    ]
    assert read_log(write(folder / "log.jsonl", "\n".join(map(json.dumps, rows)))) == [a, b]


def test_a_log_without_answers_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_log(write(folder / "log.csv", "image,label,score\na.png,1,0.9\n"))
    assert (
        "log.csv has no predictions: what was answered is not measured; not read: score"
        in caplog.text
    )
    with pytest.raises(UserError, match=r"no challenge with a label: .*; not read: truth"):
        read_log(write(folder / "log.csv", "image,prediction,truth\na.png,1,0\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column image; its columns are none"),
        ("name,label\na.png,1\n", "has no column image; its columns are name, label"),
        ("image,label,label\na.png,1,1\n", "names a column twice: label and label"),
        ("image,label,Label \na.png,1,1\n", "names a column twice: label and Label"),
        ("image,label\na.png,1\na.png\n", "line 3: 1 cells, but the header names 2 columns"),
        ("image,label\na.png,1,2\n", "line 2: 3 cells, but the header names 2 columns"),
        ("image,label\n,1\n", "line 2: image is ''; the path of a file is needed"),
        ("image,label\na.png,1\nc.png,1\nd.png,1\n", r"line 3: image .*c\.png is missing \(2 of 3"),
        ("image,label\na.png,maybe\n", "line 2: label is 'maybe'; it must be 0, 1, or empty or -1"),
        ("image,label\na.png,0.5\n", "line 2: label is '0.5'; it must be"),
        ("image,label\na.png,inf\n", "line 2: label is 'inf'; it must be"),
        (
            "image,label,prediction\na.png,1,nan\n",
            "line 2: prediction is 'nan'; it must be a finite",
        ),
        (
            "image,label,prediction\na.png,1,inf\n",
            "line 2: prediction is 'inf'; it must be a finite",
        ),
        ("image,label,prediction\na.png,1,high\n", "line 2: prediction is 'high'; it must be"),
        ("image,label\na.png,\n", "has no challenge with a label"),
        ("image,label\n", "has no challenge with a label"),
        ('image,label\n"a.png,1\n', "line 2: .*is a quote not closed"),
        ("image,label\na.png\0,1\n", "line 2 holds a zero byte"),
    ],
)
def test_a_csv_that_is_wrong(text: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_log(write(folder / "log.csv", text))
    assert "\n" not in str(caught.value)
    assert str(folder / "log.csv") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image", "line 1 is not JSON"),
        (f'{{"image": "a.png", "label": {"1" * 5000}}}', "line 1 is not JSON"),
        ('{"image": "a.png", "label": 1, "Label": 0}', "line 1 names a key twice"),
        ('{"image": "a.png", "label": 1}\n[1]', 'line 2 is no object with the key "image"'),
        ('{"label": 1}', 'line 1 is no object with the key "image"'),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"image": 5, "label": 1}', "line 1: image is 5; the path of a file is needed"),
        ('{"image": "a.png", "label": "maybe"}', "line 1: label is 'maybe'; it must be 0, 1"),
        ('{"image": "a.png", "label": [1]}', r"line 1: label is \[1\]; it must be 0, 1"),
        ('{"image": "a.png", "label": 1, "prediction": NaN}', "line 1: prediction is nan"),
        ('{"image": "a.png", "label": 1, "prediction": {}}', "line 1: prediction is {}"),
        (
            f'{{"image": "a.png", "label": 1, "prediction": 1{"0" * 400}}}',
            "line 1: prediction is 1",
        ),
    ],
)
def test_json_lines_that_are_wrong(text: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_log(write(folder / "log.jsonl", text))


def test_labels_of_a_log_are_read_as_those_of_a_source(folder: Path) -> None:
    for given, label in [
        ("Roadwork", 1),
        ("1.0", 1),
        ("True", 1),
        ("yes", 1),
        ("0.0", 0),
        ("None", 0),
    ]:
        text = f"image,label\na.png,{given}\nb.png,\nb.png,-1.0\nb.png,nan\n"
        assert [each.label for each in read_log(write(folder / "log.csv", text))] == [label] + [
            None
        ] * 3
    # What `str` makes of a missing label is missing.
    text = "image,label\na.png,1\na.png,0\nb.png,None\n"
    assert [each.label for each in read_log(write(folder / "log.csv", text))] == [1, 0, None]


def test_a_file_that_is_no_log(folder: Path) -> None:
    with pytest.raises(UserError, match=r"neither CSV \(\.csv\) nor JSON lines \(\.jsonl\)"):
        read_log(folder / "a.png")
    with pytest.raises(UserError, match=r"nowhere\.csv does not exist"):
        read_log(folder / "nowhere.csv")
    (folder / "log.csv").write_bytes(b"image,label\n\xff\xfe,1\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8 "):
        read_log(folder / "log.csv")


# --------------------------------------------------------------------------- answers and windows


def test_an_unusable_image_gets_no_answer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (9, 20)).save(folder / "small.png")
    names = ["a.png", "broken.png", "b.png", "small.png", "a.png"]
    challenges = [Challenge(folder / name, None, 1) for name in names]
    found = answers(brightness, challenges)
    np.testing.assert_allclose(found, [200 / 255, -1, 20 / 255, -1, 200 / 255])
    assert "broken.png: truncated" in caplog.text
    assert "small.png: too small" in caplog.text
    assert (answers(brightness, challenges[1:2]) == -1).all()


def test_windows_are_those_of_the_labelled(rng: np.random.Generator) -> None:
    n = 400
    predictions = rng.choice([0.1, 0.9, -1.0, None], n, p=[0.45, 0.4, 0.1, 0.05]).tolist()
    labels = rng.choice([0, 1, None], n, p=[0.4, 0.4, 0.2]).tolist()
    challenges = [Challenge(Path("x"), None, label) for label in labels]
    found = windows(predictions, challenges)
    assert found is not None
    kept = [i for i in range(n) if predictions[i] is not None and labels[i] is not None]
    assert found.rows.tolist() == kept
    assert found.unanswered == sum(predictions[i] == -1 for i in kept)
    for end, row in enumerate(kept, 1):
        window = [i for i in kept[max(0, end - 10) : end] if predictions[i] != -1]
        right = [(predictions[i] > 0.5) == labels[i] for i in window]
        assert found.accuracy[end - 1] == pytest.approx(np.mean(right) if right else 0), row
        window = [i for i in kept[max(0, end - 100) : end] if predictions[i] != -1]
        pairs = np.array([(predictions[i] > 0.5, labels[i]) for i in window], dtype=float).T
        expected = 0.0
        if len(window) > 1 and pairs.std(axis=1).all():
            expected = np.corrcoef(pairs)[0, 1]
        assert found.mcc[end - 1] == pytest.approx(expected, abs=1e-12), row
    assert windows([None] * n, challenges) is None
    assert windows(predictions, [Challenge(Path("x"), 0.5, None)] * n) is None


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_reward_is_made_of_these_windows(rng: np.random.Generator) -> None:
    predictions = rng.choice([0.1, 0.9, -1.0, 1.2, 0.5], (3, 300))
    labels = rng.integers(0, 2, (3, 300))
    mcc, accuracy = rolling_metrics(predictions, labels)
    inside = (predictions >= 0) & (predictions <= 1)
    expected = ((0.5 * np.maximum(mcc, 0) + 0.5 * accuracy) ** 3) * inside
    np.testing.assert_allclose(rewards(predictions, labels), expected, atol=1e-15)
    assert (mcc < 0).any(), "the windows' MCC is not clipped"


def run_of(n: int, wrong: int) -> Any:
    """A series of n challenges of which the last `wrong` were answered wrongly."""
    labels = [i % 2 for i in range(n)]
    right = [i < n - wrong for i in range(n)]
    values = [float(y) if ok else 1.0 - y for y, ok in zip(labels, right, strict=True)]
    found = windows(values, [Challenge(Path("x"), None, y) for y in labels])
    assert found is not None
    return found


def test_alarms_of_full_windows_only() -> None:
    assert alarms("x", run_of(200, 0), 0.8, 0.6) == []
    assert alarms("x", run_of(200, 4), 0.8, 0.6) == []
    assert alarms("x", run_of(200, 5), 0.8, 0.6) == [
        "ALARM: x: accuracy over the last 10 is 0.500, below 0.6"
    ]
    assert alarms("x", run_of(200, 10), 0.9, 0) == [
        "ALARM: x: MCC over the last 100 is 0.800, below 0.9"
    ]
    assert alarms("x", run_of(99, 10), 0.9, 0) == []
    assert alarms("x", run_of(9, 9), 0.9, 0.9) == []
    assert describe("x", run_of(200, 10)).startswith(
        "x: 200 labelled; MCC over the last 100 0.800, accuracy over the last 10 0.00, mean reward 0.9"
    )


# --------------------------------------------------------------------------- all of it


def test_what_is_written(folder: Path) -> None:
    rows = ["image,prediction,label"]
    rows += ["a.png,0.9,1", "b.png,0.8,0", "b.png,,", "broken.png,0.2,1", "a.png,,1"] * 3
    log = write(folder / "log.csv", "\n".join(rows))
    lines, raised = replay(log, brightness, folder / "out/log.replay", 0.8, 0.6)
    assert [line.split(":")[0] for line in lines] == ["bundle", "log", "written"]
    assert raised == [], "nine challenges fill no window"
    with (folder / "out/log.replay.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 15
    assert list(table[0]) == [
        "image", "label", "log", "bundle", "bundle_mcc", "bundle_accuracy", "bundle_reward",
        "log_mcc", "log_accuracy", "log_reward",
    ]  # fmt: skip
    assert [float(row["bundle"]) for row in table[:5]] == pytest.approx(
        [200 / 255, 20 / 255, 20 / 255, -1, 200 / 255]
    )
    assert [row["label"] for row in table[:5]] == ["1", "0", "", "1", "1"]
    assert [row["bundle_accuracy"] != "" for row in table[:5]] == [True, True, False, True, True]
    assert [row["log_accuracy"] for row in table[:5]] == ["1.0", "0.5", "", str(1 / 3), ""]
    with Image.open(folder / "out/log.replay.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    before = (folder / "out/log.replay.png").read_bytes()
    replay(log, brightness, folder / "out/log.replay", 0.8, 0.6)
    assert (folder / "out/log.replay.png").read_bytes() == before


def test_the_command(
    trained: Trained, tiny_splits: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    split = open_split("evaluate", "val_test", tiny_splits["val_test"])
    (tmp_path / "images").mkdir()
    rows = []
    for row in range(len(split)):
        (tmp_path / f"images/{row}.jpg").write_bytes(split.image_bytes(row))
        rows.append(f"images/{row}.jpg,{split.labels[row]}")
    good = write(tmp_path / "good.csv", "image,label\n" + "\n".join(rows))
    flipped = [f"{text[:-1]}{1 - int(text[-1])}" for text in rows]
    bad = write(tmp_path / "bad.csv", "image,label\n" + "\n".join(flipped))
    arguments = ["--bundle", str(trained.bundle)]
    assert cli.main(["replay", str(good), *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("bundle: 40 labelled; MCC over the last 100 ")
    assert "ALARM" not in shown
    assert (tmp_path / "good.replay.csv").is_file()
    assert (tmp_path / "good.replay.png").is_file()
    assert cli.main(["replay", str(bad), *arguments, "--output", str(tmp_path / "out")]) == 3
    assert "ALARM: bundle: accuracy over the last 10 is 0." in capsys.readouterr().out
    assert (tmp_path / "out/bad.replay.csv").is_file()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["replay", str(good)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streetvision replay: error: ")
    assert "models/bundle/bundle.json is missing" in error


@pytest.mark.parametrize(
    ("squares", "wholes", "mixed"), [(2, 1, True), (2, 0, False), (0, 2, False)]
)
def test_a_log_of_two_eras_is_said(
    squares: int, wholes: int, mixed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    challenges = []
    for number, size in enumerate([(224, 224)] * squares + [(320, 240)] * wholes):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", size).save(path)
        challenges.append(Challenge(path, None, 1))
    answers(lambda images: np.array([0.5 for _ in images]), challenges)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == mixed
    if mixed:
        assert said[0].startswith("the log mixes eras: 2 of 3 pictures are squares of 224 pixels")
