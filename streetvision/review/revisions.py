"""Two revisions of the project, read from Git or the working tree and compared on their test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from streetvision.core import git
from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.escaping import shortened
from streetvision.data.store import Split, open_split
from streetvision.evaluation.evaluate import EVIDENCE, PICTURE, picture_hash
from streetvision.evaluation.predictions import Predictions, parse_predictions
from streetvision.review.compare import Change, Comparison, compare_predictions
from streetvision.review.experiments import Run, finished, working_tree
from streetvision.review.freshness import MEND, PARAMS
from streetvision.stats.metrics import check_prior

SHEET_IMAGES = 24


@dataclass(frozen=True)
class Revision:
    """The project in `root` at a Git revision, branch, tag or DVC experiment; None is the working tree."""

    root: Path
    rev: str | None

    def __str__(self) -> str:
        return "working tree" if self.rev is None else shortened(self.rev)

    @cached_property
    def run(self) -> Run:
        """Its parameters and metrics; UserError as `experiments.finished`."""
        if self.rev is None:
            return working_tree(self.root)
        return finished(self.root, [self.rev])[0]

    def read(self, path: Path) -> str | None:
        """The text of a file below `root`; None if it is not there.

        What compares revisions is in Git: metrics, tables and parameters. No DVC remote is asked, as a
        revision's own configuration says which.

        Raises
        ------
        UserError
            No such revision, no repository, or no text.
        """
        name = path.relative_to(self.root).as_posix()
        try:
            if self.rev is None:
                return path.read_text(encoding="utf-8")
            commit = git.commit_of(self.root, self.rev)
            data = git.files(self.root, [(commit, name)])[commit, name]
            return None if data is None else data.decode()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {name} of {self}: {error}") from error

    def predictions(self) -> Predictions:
        """VAL_TEST's `predictions.csv`; UserError if there is none or it is broken."""
        path = ArtifactSchema(self.root).plot("predictions.csv")
        text = self.read(path)
        name = f"{path.relative_to(self.root)} of {self}"
        if text is None:
            raise UserError(f"{name} is missing; the stage `evaluate` makes it")
        return parse_predictions(text, name)

    def notes(self) -> list[str]:
        """What the reader of its results must know of them, a sentence each; what is stale goes first."""
        found = [f"stale in {self}: {line}" for line in self.run.freshness.lines()]
        if self.run.preset is not None:
            found.append(
                f"the results of {self} are those of the preset {self.run.preset}, not of its {PARAMS}"
            )
        if self.run.freshness.unknown:
            paths = ", ".join(map(shortened, self.run.freshness.unknown))
            found.append(f"whether {paths} is what {self} ran with is not known: it is not in Git")
        return found

    def parameter(self, section: str, key: str) -> object:
        """One parameter, of a schema that may be older than today's; None if it is not there."""
        return self.run.params.get(f"{section}.{key}")


@dataclass(frozen=True)
class Review:
    """Two revisions and their comparison.

    Attributes
    ----------
    images
        VAL_TEST as it lies here, if it holds the images whose decision changed.
    notes
        What the reader must know about what was compared, a sentence each.
    stale_base
        Whether any results of `base` are not of its own code, parameters and data.
    """

    base: Revision
    head: Revision
    comparison: Comparison
    images: Split | None
    notes: tuple[str, ...]
    stale_base: bool = False


def review(base: Revision, head: Revision, seed: int = 0) -> Review:
    """Compare VAL_TEST's predictions of two revisions at the served prior of `head`.

    Raises
    ------
    UserError
        What `Revision` and `compare_predictions` refuse; no served prior in `head`'s parameters.
    """
    tables = base.predictions(), head.predictions()
    priors = [each.parameter("decision", "served_prior") for each in (base, head)]
    if not isinstance(priors[1], float):
        raise UserError(f"{PARAMS} of {head}: decision.served_prior is missing or no number")
    comparison = compare_predictions(
        *tables, check_prior(priors[1]), against_all_negatives=[EVIDENCE], seed=seed
    )
    notes = [note for each in dict.fromkeys((base, head)) for note in each.notes()]
    if base.run.freshness.stale or head.run.freshness.stale:
        notes.append(MEND)
    notes += _matching_notes(base, head, comparison)
    for each, table in dict(zip((base, head), tables, strict=True)).items():
        if table.pictures is None:
            notes.append(
                f"the predictions of {each} have no {PICTURE}, so images are told apart by their id alone"
            )
    if priors[0] != priors[1]:
        before = shortened(str(priors[0]))
        notes.append(f"the served prior was {before} in {base}; both are taken at {priors[1]}")
    images, missing = _images(head.root, tables[1], comparison.changes)
    stale_base = bool(base.run.freshness.stale)
    return Review(base, head, comparison, images, (*notes, *missing), stale_base)


def contact_sheet(found: Review, count: int = SHEET_IMAGES) -> bytes | None:
    """PNG of images whose decision changed, those that head gets wrong first; None without the images.

    Half of `count` at least go to each kind, if there are so many; largest change of probability first.
    """
    from streetvision.plots.pictures import plot_mistakes

    if found.images is None:
        return None
    rows = {str(name): row for row, name in enumerate(found.images.ids)}
    kinds = [[c for c in found.comparison.changes if c.right == side] for side in ("base", "head")]
    lost = kinds[0][: max(count // 2, count - len(kinds[1]))]
    chosen = [*lost, *kinds[1][: count - len(lost)]]
    captions = [
        f"{'roadwork' if each.label else 'none'}, p = {each.base:.2f} → {each.head:.2f}\n"
        f"{'now right' if each.right == 'head' else 'now wrong'}"
        for each in chosen
    ]
    title = f"{len(kinds[0])} decisions now wrong, {len(kinds[1])} now right"
    return plot_mistakes([found.images.image(rows[each.id]) for each in chosen], captions, title)


def _matching_notes(base: Revision, head: Revision, comparison: Comparison) -> list[str]:
    """In what the test sets differ."""
    matching = comparison.matching
    if matching.same:
        return []
    notes = [
        (
            f"the test sets differ: {matching.n_base:,} images in {base}, {matching.n_head:,} in {head}; "
            f"compared are the {comparison.n:,} that both have with one label"
        )
    ]
    for names, what in ((matching.others, "picture"), (matching.conflicts, "label")):
        if names:
            shown = ", ".join(map(shortened, names[:5]))
            notes.append(
                f"{len(names):,} images have another {what} in each and are left out: {shown}"
            )
    return notes


def _images(
    root: Path, predictions: Predictions, changes: Sequence[Change]
) -> tuple[Split | None, list[str]]:
    """VAL_TEST of the working tree, if it holds the pictures of these changes; else why not."""
    path = ArtifactSchema(root).split("val_test")
    name, without = path.relative_to(root), "so there are no pictures of changed decisions"
    if not changes or predictions.pictures is None:
        return None, []
    if not path.is_file():
        return None, [f"{name} is not here, {without}"]
    split = open_split("evaluate", "val_test", path)
    rows = {str(each): row for row, each in enumerate(split.ids)}
    wanted = dict(zip(predictions.ids.tolist(), predictions.pictures.tolist(), strict=True))
    for change in changes:
        row = rows.get(change.id)
        if row is None or picture_hash(split.image_bytes(row)) != wanted[change.id]:
            return None, [f"{name} holds other images, {without}"]
    return split, []
