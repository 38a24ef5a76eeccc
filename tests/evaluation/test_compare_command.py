"""`compare` as it is typed, in a small project with Git and DVC."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streetvision import cli
from streetvision.artifacts import write_csv_atomic
from streetvision.bundle.predictor import Predictor
from streetvision.data.store import open_split
from streetvision.evaluation.evaluate import evaluate_split, write_evaluation
from streetvision.evaluation.revisions import Revision, contact_sheet, review
from tests.pipeline.project import Project

Run = Callable[..., tuple[int, str, str]]
TABLE = "metrics/plots/predictions.csv"


def with_noise(predictions: dict[str, Any], size: float, seed: int) -> dict[str, list[Any]]:
    """The same predictions with noise on their log-odds."""
    p = np.clip(np.asarray(predictions["probability"], dtype=np.float64), 1e-3, 1 - 1e-3)
    logits = np.log(p / (1 - p)) + np.random.default_rng(seed).normal(0, size, len(p))
    columns = {name: list(values) for name, values in predictions.items()}
    return columns | {"probability": (1 / (1 + np.exp(-logits))).tolist()}


@pytest.fixture(scope="session")
def made(
    trained: Any,
    write_split: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    repository: Path,
) -> Project:
    """The tiny bundle's real evaluation as `main`, a noisier one as the experiment `noisy`. Read only."""
    project = Project(tmp_path_factory.mktemp("compared") / "project")
    split = write_split(project / "data/splits/val_test.arrow", 160, groups=16)
    found = evaluate_split(
        Predictor.load(trained.bundle), open_split("evaluate", "val_test", split), 0.5,
        n_resamples=100, mistakes=4, seed=7,
    )  # fmt: skip
    write_evaluation(found, project / "metrics/evaluation.json", project / "metrics/plots")
    shutil.copy(repository / "params.yaml", project / "params.yaml")
    (project / ".gitignore").write_text("/data/splits/\n")
    (project / "dvc.yaml").write_text("metrics: [metrics/evaluation.json]\n")
    project.git("init", "--quiet", "--initial-branch", "main")
    project.dvc("init", "--quiet")
    project.commit()
    write_csv_atomic(project / TABLE, with_noise(found.predictions, 6.0, seed=0))
    project.dvc("exp", "save", "--name", "noisy")
    project.git("checkout", "--quiet", "--", ".")
    return project


@pytest.fixture
def compared(made: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy to change, and the working directory."""
    shutil.copytree(made.root, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, output and error output of a command line."""

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return command


def predictions(text: str) -> dict[str, dict[str, str]]:
    return {row["id"]: row for row in csv.DictReader(io.StringIO(text))}


def scalars(document: Any) -> list[Any]:
    if not isinstance(document, dict):
        return [document]
    return [leaf for value in document.values() for leaf in scalars(value)]


def test_a_branch_against_an_experiment(compared: Project, run: Run) -> None:
    before = compared.git("status", "--porcelain").stdout
    code, shown, _ = run(
        "compare", "main", "noisy", "--md", "report/c.md", "--json", "report/c.json", "--output", "report"
    )  # fmt: skip
    assert code == 0
    assert shown.startswith("noisy against main\n")
    assert "160 test images in 16 groups" in shown
    report = json.loads((compared / "report/c.json").read_text())
    experiment = compared.git(
        "for-each-ref", "--format", "%(refname)", "refs/exps/**/noisy"
    ).stdout.strip()
    base, head = (
        predictions(compared.git("show", f"{rev}:{TABLE}").stdout) for rev in ("main", experiment)
    )
    changed = {
        name for name in base
        if (float(base[name]["probability"]) > 0.5) != (float(head[name]["probability"]) > 0.5)
    }  # fmt: skip
    assert changed
    assert set(report["changed"]) == changed
    for name, each in report["changed"].items():
        right = (each["head"] > 0.5) == (int(base[name]["label"]) == 1)
        assert each["right"] == ("head" if right else "base")
    mcc = report["metrics"]["mcc"]
    evaluated = json.loads((compared / "metrics/evaluation.json").read_text())
    assert mcc["base"]["value"] == pytest.approx(evaluated["mcc"])
    assert mcc["delta"]["value"] == pytest.approx(mcc["head"]["value"] - mcc["base"]["value"])
    assert mcc["delta"]["low"] < mcc["delta"]["value"] < mcc["delta"]["high"]
    assert f"{mcc['delta']['value']:+.4f}" in shown
    for leaf in scalars(report):
        assert isinstance(leaf, str | int | float)
        assert not isinstance(leaf, float) or math.isfinite(leaf)
    assert {key.split(".")[0] for key in report["slices"]} == {
        "weather",
        "daytime",
        "evidence_size",
    }
    with (compared / "report/changed.csv").open(newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == changed
    with Image.open(compared / "report/changed.png") as image:
        assert image.format == "PNG"
    markdown = (compared / "report/c.md").read_text()
    assert "### noisy against main" in markdown
    tables = [block for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    # Nothing was written but what was asked for.
    assert compared.git("status", "--porcelain").stdout == before + "?? report/\n"


def test_the_working_tree_is_the_default_and_other_test_sets_are_named(
    compared: Project, run: Run
) -> None:
    lines = (compared / TABLE).read_text().splitlines()
    fields = lines[5].split(",")
    fields[2] = str(1 - int(fields[2]))
    (compared / TABLE).write_text("\n".join([*lines[:5], ",".join(fields), *lines[6:-10]]) + "\n")
    code, shown, _ = run("compare", "main")
    assert code == 0
    assert shown.startswith("working tree against main\n")
    assert (
        "Note: the test sets differ: 160 images in main, 150 in working tree; compared are the 149"
        in shown
    )
    assert f"1 images have another label in each and are left out: {fields[0]}" in shown
    # The split on this disk has other labels than the table, so it may not explain it.
    assert "val_test.arrow holds other images" in shown
    assert "by slice" not in shown


def test_without_the_images_there_are_no_slices_and_it_says_so(compared: Project, run: Run) -> None:
    (compared / "data/splits/val_test.arrow").unlink()
    found = review(Revision(compared.root, "main"), Revision(compared.root, "noisy"))
    assert found.comparison.slices == ()
    assert contact_sheet(found) is None
    assert found.notes == (
        "data/splits/val_test.arrow is not here, so there are no slices and no pictures of changed decisions",
    )
    assert run("compare", "main", "noisy", "--output", "report")[0] == 0
    assert [path.name for path in (compared / "report").iterdir()] == ["changed.csv"]


def test_another_served_prior_is_named_and_heads_is_taken(compared: Project) -> None:
    text = (compared / "params.yaml").read_text()
    assert text.count("served_prior: 0.5") == 1
    (compared / "params.yaml").write_text(text.replace("served_prior: 0.5", "served_prior: 0.25"))
    found = review(Revision(compared.root, "main"), Revision(compared.root, None))
    assert found.comparison.served_prior == 0.25
    assert found.notes == ("the served prior was 0.5 in main; both are taken at 0.25",)


def test_the_sheet_shows_both_kinds(compared: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from streetvision.evaluation import plots

    shown: list[Any] = []
    monkeypatch.setattr(plots, "plot_mistakes", lambda *arguments: shown.append(arguments) or b"")
    found = review(Revision(compared.root, "noisy"), Revision(compared.root, "main"))
    kinds = [c.right for c in found.comparison.changes]
    contact_sheet(found, 4)
    images, captions, title = shown[0]
    assert title == f"{kinds.count('base')} decisions now wrong, {kinds.count('head')} now right"
    wrong = [caption for caption in captions if "now wrong" in caption]
    assert len(images) == len(captions) == min(4, len(kinds))
    assert len(wrong) == min(kinds.count("base"), max(2, 4 - kinds.count("head")))
    assert captions[: len(wrong)] == wrong
    first = next(c for c in found.comparison.changes if c.right == ("base" if wrong else "head"))
    assert found.images is not None
    row = found.images.ids.tolist().index(first.id)
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(found.images.image(row)))
    assert f"p = {first.base:.2f} → {first.head:.2f}" in captions[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], '"nope" is no Git revision, branch, tag or DVC experiment'),
        (["main", "nope"], '"nope" is no Git revision'),
    ],
)
def test_an_unknown_revision_is_one_line(
    compared: Project, run: Run, arguments: list[str], message: str
) -> None:
    code, shown, said = run("compare", *arguments)
    assert (code, shown) == (2, "")
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_revision_without_predictions_is_named(compared: Project, run: Run) -> None:
    compared.git("rm", "--quiet", TABLE)
    compared.commit()
    code, _, said = run("compare", "HEAD")
    assert code == 2
    assert f"{TABLE} of HEAD is missing; the stage `evaluate` makes it" in said
    outside = Revision(compared.root.parent, "main")
    with pytest.raises(Exception, match="git repository"):
        outside.predictions()
