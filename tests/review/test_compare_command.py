"""`compare` as it is typed, in a small project with Git and DVC."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streetvision.core.artifacts import write_csv_atomic
from streetvision.review.revisions import Revision, contact_sheet, review
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
    assert "by slice" in shown


def test_without_the_images_there_are_slices_but_no_pictures(
    compared: Project, run: Run, write_split: Callable[..., Path]
) -> None:
    sides = Revision(compared.root, "main"), Revision(compared.root, "better")
    here, split = review(*sides), compared / "data/splits/val_test.arrow"
    assert {each.name for each in here.comparison.slices} == {"weather", "daytime", "evidence_size"}
    assert (here.notes, contact_sheet(here) is None) == ((), False)
    split.unlink()
    for why in ("is not here", "holds other images"):
        found = review(*sides)
        assert found.comparison == here.comparison
        assert contact_sheet(found) is None
        without = "so there are no pictures of changed decisions"
        assert found.notes == (f"data/splits/val_test.arrow {why}, {without}",)
        assert run("compare", "main", "better", "--output", "report")[0] == 0
        assert [path.name for path in (compared / "report").iterdir()] == ["changed.csv"]
        write_split(split, 160, groups=16, seed=1)  # the same ids, other pictures
    # Of no change there is nothing to show, and nothing to say.
    assert review(sides[0], Revision(compared.root, None)).notes == ()


def test_other_pictures_under_the_same_ids_are_another_test_set(
    compared: Project, run: Run
) -> None:
    rows = list(csv.DictReader(io.StringIO((compared / TABLE).read_text())))

    def write(changed: int) -> None:
        for row in rows[:changed]:
            row["image_sha256"] = "0" * 16
        write_csv_atomic(compared / TABLE, {name: [row[name] for row in rows] for name in rows[0]})

    write(3)
    code, shown, _ = run("compare", "main")
    assert code == 0
    assert "compared are the 157 that both have" in shown
    named = ", ".join(row["id"] for row in rows[:3])
    assert f"3 images have another picture in each and are left out: {named}" in shown
    write(81)
    code, shown, said = run("compare", "main")
    assert (code, shown) == (2, "")
    assert "the test sets differ: of 160 and 160 images they share 79, 81 more only an id" in said
    assert said.count("\n") == 1


def test_a_table_without_pictures_is_compared_by_id_and_says_so(
    compared: Project, run: Run
) -> None:
    rows = list(csv.DictReader(io.StringIO((compared / TABLE).read_text())))
    names = ("id", "group", "label", "probability")
    write_csv_atomic(compared / TABLE, {name: [row[name] for row in rows] for name in names})
    note = "predictions of working tree have no image_sha256, so images are told apart by their id alone"
    for sides in (("main",), ("working tree", "main")):
        given = [
            Revision(compared.root, None if each == "working tree" else each) for each in sides
        ]
        found = review(given[0], given[1] if len(given) > 1 else Revision(compared.root, None))
        assert found.comparison.matching.same
        assert [each for each in found.notes if note in each]
        # Slices are those of head.
        assert bool(found.comparison.slices) == (found.head.rev == "main")


def test_another_served_prior_is_named_and_heads_is_taken(compared: Project) -> None:
    text = (compared / "params.yaml").read_text()
    assert text.count("served_prior: 0.5") == 1
    (compared / "params.yaml").write_text(text.replace("served_prior: 0.5", "served_prior: 0.25"))
    found = review(Revision(compared.root, "main"), Revision(compared.root, None))
    assert found.comparison.served_prior == 0.25
    assert found.notes == ("the served prior was 0.5 in main; both are taken at 0.25",)


def test_the_sheet_shows_both_kinds(compared: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from streetvision.plots import pictures as plots

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
