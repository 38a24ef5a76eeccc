"""`predict`: files, folders and globs to probabilities; what cannot be read does not stop the rest."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from streetvision import cli
from streetvision.bundle import predict
from streetvision.bundle.predict import Prediction, find_images, predict_files, write_predictions
from streetvision.bundle.predictor import Predictor

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """20 photographs in two folders, and three files that are none."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for number in range(20):
        path = (
            folder
            / ("night" if number % 4 == 0 else ".")
            / f"{number:02d}.{('jpg', 'PNG')[number % 2]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        image.save(path)
    (folder / "05b.jpg").write_bytes((folder / "05.PNG").read_bytes()[:900])
    (folder / "99.webp").write_bytes(b"<svg/>")
    (folder / "._01.PNG").write_bytes(b"what macOS leaves")
    (folder / "notes.txt").write_text("no image")
    return folder


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_files_folders_and_globs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = names(find_images([str(photos)]), photos)
    assert len(found) == 22
    assert found == sorted(found)
    assert "night/00.jpg" in found
    assert not {"._01.PNG", "notes.txt"} & set(found)
    by_glob = find_images([f"{photos}/*.PNG", f"{photos}/01.PNG", f"{photos}/ni*t"])
    assert names(by_glob, photos) == [
        *(f"{number:02d}.PNG" for number in range(1, 20, 2)),
        *(f"night/{number:02d}.jpg" for number in range(0, 20, 4)),
    ]
    assert len(find_images([f"{photos}/**/*.jpg"])) == 11
    # What is asked for by name is read whatever it is called, and what is not there says so.
    (photos / "a[1].jpg").write_bytes(b"")
    monkeypatch.chdir(photos)
    asked = ["a[1].jpg", "notes.txt", "none*.jpg", "missing.jpg"]
    assert find_images(asked) == [Path(name) for name in asked]


def test_one_bad_file_does_not_stop_the_rest(photos: Path, trained: Trained) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    (photos / "empty").mkdir()
    paths = find_images([str(photos), str(photos / "missing.jpg"), str(photos / "empty")])
    found = list(predict_files(predictor, paths))
    assert [each.path for each in found] == paths
    errors = {each.path.name: each.error for each in found if each.error}
    assert set(errors) == {"05b.jpg", "99.webp", "missing.jpg", "empty"}
    assert errors["05b.jpg"].startswith(f"{photos}/05b.jpg: truncated")
    assert errors["empty"] == f"{photos}/empty is a folder, not a file"
    for each in found:
        if each.error:
            assert each.probability is None
            assert each.decision is None
        else:
            assert each.probability == pytest.approx(predictor(each.path), abs=1e-6)
            assert each.decision == (each.probability > 0.5)  # type: ignore[operator]


def test_one_image_is_in_memory_at_once(
    photos: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    order: list[str] = []
    apply = type(predictor.config.preprocessing).apply

    def counted(*arguments: Any) -> Any:
        order.append("prepared")
        return apply(*arguments)

    monkeypatch.setattr(type(predictor.config.preprocessing), "apply", counted)
    real = predict.upright_image
    monkeypatch.setattr(
        predict, "upright_image", lambda *given: order.append("read") or real(*given)
    )
    paths = find_images([f"{photos}/*.PNG"])
    list(predict_files(predictor, paths))
    reads = [place for place, each in enumerate(order) if each == "read"]
    assert all("prepared" in order[a:b] for a, b in zip(reads, [*reads[1:], None], strict=True))


def test_the_command(
    photos: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(trained.bundle / "bundle.tar.gz")
    good = [str(photos / "01.PNG"), str(photos / "night")]
    assert cli.main(["predict", bundle, *good]) == 0
    shown = capsys.readouterr()
    lines = [line.split("\t") for line in shown.out.splitlines()]
    assert [line[2] for line in lines] == [str(path) for path in find_images(good)]
    assert all(line[1] == ("Roadwork" if float(line[0]) > 0.5 else "None") for line in lines)
    assert shown.err.splitlines() == ["6 of 6 images scored, 0 failed"]

    out = tmp_path / "answers" / "out.csv"
    assert cli.main(["predict", bundle, str(photos), "--csv", str(out), "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1] == "20 of 22 images scored, 2 failed"
    assert sum("not an image" in line for line in shown.err.splitlines()) == 1
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(path) for path in find_images([str(photos)])]
    assert [bool(row["error"]) for row in rows].count(True) == 2
    for row in rows:
        if row["error"]:
            assert row["probability"] == row["decision"] == ""
        else:
            assert int(row["decision"]) == (float(row["probability"]) > 0.5)

    assert cli.main(["predict", str(tmp_path), str(photos)]) == 2
    assert "bundle.json is missing" in capsys.readouterr().err


def test_names_that_are_no_text(trained: Trained, tmp_path: Path) -> None:
    path = Path(f"{tmp_path}/street\udcff\n1.png")
    Image.new("RGB", (40, 40)).save(path)
    out = tmp_path / "out.csv"
    predictor = Predictor.load(trained.bundle, "cpu")
    write_predictions(predict_files(predictor, find_images([str(tmp_path)])), out)
    with out.open(newline="") as file:
        assert next(csv.DictReader(file))["path"] == rf"{tmp_path}/street\xff\n1.png"
    write_predictions([], out)
    assert out.read_text() == "path,probability,decision,error\n"


def test_half_is_negative() -> None:
    assert Prediction(Path("a"), 0.5).decision == 0
    assert Prediction(Path("a"), 0.5000001).decision == 1
