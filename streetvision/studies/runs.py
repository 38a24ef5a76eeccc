"""One run: train a variant on one fold with one seed, score VAL_SELECT, seal the scores of VAL_TEST.

A finished run is one line of a JSON-lines file, on disk before the next one starts, so a table that is
interrupted goes on where it was. The line holds counts of decisions, from which any pooled MCC follows.
What the model says of VAL_TEST goes to a file of its own, which only the last table opens, and only for
what was chosen.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import config_hash, write_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Params
from streetvision.data.transforms import Preprocessing
from streetvision.studies.data import Fold

if TYPE_CHECKING:
    from streetvision.training.training import TrainingResult

# These sections cannot change a run.
_UNUSED = {
    "data", "probe", "views", "embed", "cvfm", "sweep", "decision", "export", "evaluate", "challenge",
    "gates", "hardware",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a worker needs; relative weights in `params` lie below `root`, all results below `scratch`."""

    comparison: str
    variant: str
    seed: int
    fold_number: int
    fold: Fold
    params: Params
    root: Path
    scratch: Path
    code: str

    @property
    def key(self) -> str:
        """Parameters and data of the run; not the code, whose version the line records beside it."""
        return config_hash(
            {
                "comparison": self.comparison,
                "variant": self.variant,
                "data": self.fold.folder.parent.name,
                "fold": self.fold_number,
                "params": self.params.model_dump(mode="json", exclude=_UNUSED),
            }
        )[:24]

    @property
    def sealed(self) -> Path:
        """The scores of VAL_TEST."""
        return self.scratch / "sealed" / f"{self.key}.npz"


@dataclass(frozen=True)
class Scores:
    """Probabilities of a split: `clean` [N], `levels` [4, N] of its distorted versions."""

    clean: NDArray[np.float64]
    levels: NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What a trained variant says of VAL_SELECT and of VAL_TEST."""

    select: Scores
    test: Scores
    trainable_parameters: int


def run_variant(params: Params, fold: Fold, root: Path, scratch: Path) -> Outcome:
    """Adapt (where `explora.enabled`), train and score one variant; needs no other run.

    Raises
    ------
    UserError
        The parameters do not fit together, or training diverged.
    """
    from streetvision.models.classifier import pick_device

    adapted = adapt(params, fold, root, scratch) if params.explora.enabled else None
    result = train(params, fold, root, scratch / "train", adapted)
    trained = result.model.to(pick_device(params.hardware.device))
    select, test = (
        _score(trained, result.config.preprocessing, fold, name, params)
        for name in ("val_select", "val_test")
    )
    return Outcome(select, test, int(result.metrics["trainable_parameters"]))


def train(
    params: Params, fold: Fold, root: Path, scratch: Path, adapted: Path | None = None
) -> TrainingResult:
    """What the stage `train` does, on one fold."""
    from streetvision.training.training import build_classifier, fit_classifier

    model, config = build_classifier(params.train, params.seed, root, adapted)
    return fit_classifier(
        model, config, params.train, fold.open("train", "train"), fold.open("val_select", "train"),
        subnet=params.subnet, seed=params.seed, scratch=scratch, hardware=params.hardware,
        compile_settings=params.compile,
    )  # fmt: skip


def adapt(params: Params, fold: Fold, root: Path, scratch: Path) -> Path:
    """What the stage `explora` does, on one fold; the folder of the adapted backbone."""
    from streetvision.explora.adapted import save_adaptation
    from streetvision.explora.pretraining import adapt_backbone
    from streetvision.models.backbone import initial_backbone

    folder = scratch / "adapted"
    if (folder / "config.json").is_file():  # written last
        return folder
    backbone, _, _, preprocessing = initial_backbone(params.train, params.seed, root)
    result = adapt_backbone(
        backbone, params.explora, fold.open("train", "explora"), fold.open("val_select", "explora"),
        preprocessing, pretrained=params.train.weights != "none",
        freeze_norm=params.train.freeze_norm, seed=params.seed, scratch=scratch / "explora",
        hardware=params.hardware, compile_settings=params.compile,
    )  # fmt: skip
    save_adaptation(result, {}, folder)
    return folder


def _score(
    model: Any, preprocessing: Preprocessing, fold: Fold, name: str, params: Params
) -> Scores:
    from streetvision.models.classifier import pick_device, score, score_split

    device, size = pick_device(params.hardware.device), params.embed.batch_size
    inputs = np.load(fold.distorted(name, preprocessing), mmap_mode="r")
    clean, _ = score_split(model, preprocessing, fold.read(name), size, device)
    levels = [score(model, preprocessing, level, size, device)[0] for level in inputs]
    return Scores(_sigmoid(clean), _sigmoid(np.stack(levels)))


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    from scipy.special import expit

    return np.asarray(expit(logits.astype(np.float64)))


def record(labels: NDArray[np.int64], scores: Scores) -> dict[str, Any]:
    """The part of a run's line that tells how good it is, from VAL_SELECT's labels [N]."""
    from streetvision.stats.metrics import all_metrics, confusion

    found = all_metrics(labels, scores.clean)
    return {
        "images": len(labels),
        "clean": confusion(labels, scores.clean),
        "levels": [confusion(labels, level) for level in scores.levels],
        "mcc": found["mcc"],
        "log_loss": found["log_loss"],
        "roc_auc": found.get("roc_auc"),
    }


def finish(run: Run) -> dict[str, Any]:
    """Do a run and append its line; a variant that cannot be trained leaves the reason instead of scores."""
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    line: dict[str, Any] = {
        "key": run.key, "comparison": run.comparison, "variant": run.variant, "seed": run.seed,
        "fold": run.fold_number, "code": run.code,
    }  # fmt: skip
    scratch = run.scratch / "running" / run.key
    try:
        outcome = run_variant(run.params, run.fold, run.root, scratch)
        line |= record(run.fold.read("val_select").labels, outcome.select)
        line["trainable_parameters"] = outcome.trainable_parameters
        _seal(run.sealed, outcome.test)
    except UserError as error:
        line["error"] = " ".join(str(error).split())
    line["seconds"] = round(time.perf_counter() - start, 2)
    append_line(results_file(run.scratch), line)
    shutil.rmtree(scratch, ignore_errors=True)
    return line


def _seal(path: Path, scores: Scores) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, clean=scores.clean, levels=scores.levels)

    write_atomic(path, write)


def unseal(run: Run) -> Scores:
    """The scores of VAL_TEST; only for the baseline and for what was chosen on VAL_SELECT."""
    with np.load(run.sealed) as stored:
        return Scores(stored["clean"], stored["levels"])


def results_file(scratch: Path) -> Path:
    """One JSON line a finished run."""
    return scratch / "results.jsonl"


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line at once and to the disk; several processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # A line that a crash cut stays alone.
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line, sort_keys=True, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """Lines of finished runs by key; a line that a crash cut, or whose scores are lost, does not count."""
    found = {}
    wanted = {run.key: run for run in runs}
    for key, line in whole_lines(path).items():
        run = wanted.get(key)
        if run is not None and ("error" in line or run.sealed.is_file()):
            found[key] = line
    return found


def whole_lines(path: Path) -> dict[str, dict[str, Any]]:
    """All lines of a file by key, the last of each; a line that a crash cut is left out."""
    found = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[line["key"]] = line
    return found
