"""`compare` as it is typed, in a small project with Git and DVC."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streetvision.evaluation.revisions import Revision, contact_sheet, review
from tests.pipeline.project import Project

Run = Callable[..., tuple[int, str, str]]
TABLE = "metrics/plots/predictions.csv"


def predictions(text: str) -> dict[str, dict[str, str]]:
    return {row["id"]: row for row in csv.DictReader(io.StringIO(text))}


def scalars(document: Any) -> list[Any]:
    if not isinstance(document, dict):
        return [document]
    return [leaf for value in document.values() for leaf in scalars(value)]


def test_a_branch_against_an_experiment(compared: Project, run: Run) -> None:
    before = compared.git("status", "--porcelain").stdout
    code, shown, _ = run(
        "compare", "main", "better", "--md", "report/c.md", "--json", "report/c.json", "--output", "report"
    )  # fmt: skip
    assert code == 0
    assert shown.startswith("better against main\n")
    assert "160 test images in 16 groups" in shown
    report = json.loads((compared / "report/c.json").read_text())
    experiment = compared.git(
        "for-each-ref", "--format", "%(refname)", "refs/exps/**/better"
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
    assert "### better against main" in markdown
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
    found = review(Revision(compared.root, "main"), Revision(compared.root, "better"))
    assert found.comparison.slices == ()
    assert contact_sheet(found) is None
    assert found.notes == (
        "data/splits/val_test.arrow is not here, so there are no slices and no pictures of changed decisions",
    )
    assert run("compare", "main", "better", "--output", "report")[0] == 0
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
    found = review(Revision(compared.root, "better"), Revision(compared.root, "main"))
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
        (["nope"], '"nope" is neither a DVC experiment nor a Git revision'),
        (["main", "nope"], '"nope" is neither a DVC'),
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
    with pytest.raises(Exception, match="in no Git repository"):
        outside.predictions()
