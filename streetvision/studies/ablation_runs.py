"""The runs of the ladder: a network with the scores of single views, or what follows on its views.

A run leaves a JSON line and log-odds: those that choices are made by in one file, those of VAL_TEST in another,
which only the last table opens, and only for what was chosen. All runs see the same distorted images.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import config_hash, read_json, write_atomic, write_json_atomic
from streetvision.core.errors import UserError
from streetvision.core.schema import CONDITIONS
from streetvision.studies.data import SEED
from streetvision.studies.decision_runs import rule_out_of_fold
from streetvision.studies.runs import Run, adapt, append_line, results_file, train

if TYPE_CHECKING:
    from streetvision.core.params import Params, ViewGrid
    from streetvision.data.store import Split
    from streetvision.data.transforms import Preprocessing
    from streetvision.data.views import ViewScores
    from streetvision.fusion.fitting import LabelledViews
    from streetvision.models.classifier import RoadworkClassifier

log = logging.getLogger(__name__)
Floats = NDArray[np.float64]
VIEWS = "views"
# What decision rules are fitted on: the global view's logits, or the fused ones.
SINGLE, FUSED = "single", "fused"
BASES = (SINGLE, FUSED)
AUTO = "auto"
STAGES = ("calibrated", "deployed")
# Not calibrated, but moved to the served prior as what is calibrated: the rung differs by the map alone.
MOVED = "moved"


def rule(base: str, calibrator: str, stage: str) -> str:
    """Name of the log-odds of a decision rule."""
    return f"{base}/{calibrator}/{stage}"


@dataclass(frozen=True)
class Job:
    """A network to train or, with `network` (the job that trained it), what follows on its views."""

    run: Run
    network: Job | None = None

    @property
    def key(self) -> str:
        """What determines the results, without the code."""
        sections = {"embed", "subnet"}
        if self.network is not None:
            sections |= {"views", "cvfm", "decision"}
        return config_hash(
            {
                "run": self.run.key,
                "network": None if self.network is None else self.network.key,
                "params": self.run.params.model_dump(mode="json", include=sections),
                "ladder": True,
            }
        )[:24]

    @property
    def model(self) -> Path:
        """The trained classifier."""
        return self.run.scratch / "models" / self.key

    def scores(self, split: str) -> Path:
        """Log-odds by name; those of VAL_TEST are sealed."""
        folder = "sealed" if split == "val_test" else "scores"
        return self.run.scratch / folder / f"{self.key}-{split}.npz"

    def read(self, split: str) -> dict[str, Floats]:
        """The log-odds of a split by name."""
        with np.load(self.scores(split)) as stored:
            return dict(stored)

    def finished(self, lines: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the line is there, and all that belongs to it."""
        line = lines.get(self.key)
        if line is None or "error" in line:
            return line is not None
        needed = [self.scores(name) for name in line["splits"]]
        return all(path.exists() for path in [*needed, *([] if self.network else [self.model])])


def finish(job: Job) -> dict[str, Any]:
    """Do a job and append its line; one that cannot be done leaves the reason."""
    import torch

    torch.set_num_threads(1)
    run = job.run
    line: dict[str, Any] = {
        "key": job.key, "comparison": run.comparison, "variant": run.variant, "seed": run.seed,
        "fold": run.fold_number, "code": run.code,
    }  # fmt: skip
    try:
        found, log_odds = _train(job) if job.network is None else _decide(job)
        line |= found | {"splits": sorted(log_odds)}
        for split, arrays in log_odds.items():
            _write(job.scores(split), arrays)
    except UserError as error:
        line["error"] = " ".join(str(error).split())
    append_line(results_file(run.scratch), line)
    shutil.rmtree(run.scratch / "running" / job.key, ignore_errors=True)
    return line


def _write(path: Path, arrays: Mapping[str, Floats]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomic(path, write)


Found = tuple[dict[str, Any], dict[str, dict[str, Floats]]]


def _train(job: Job) -> Found:
    """Adapt, train and save a network; the log-odds of its global view on VAL_SELECT and VAL_TEST."""
    from streetvision.models.classifier import pick_device, save_classifier

    run, params = job.run, job.run.params
    adapted, seconds = _adapted(run) if params.explora.enabled else (None, 0.0)
    start = time.perf_counter()
    result = train(params, run.fold, run.root, run.scratch / "running" / job.key, adapted)
    seconds += time.perf_counter() - start
    model = result.model.to(pick_device(params.hardware.device)).eval()
    one = params.views.model_copy(update={"grid": 1, "flip": False})
    log_odds = {
        name: {
            condition: _views(
                model, result.config.preprocessing, run.fold.read(name), condition, params, one
            ).logits[:, 0]
            for condition in CONDITIONS
        }
        for name in ("val_select", "val_test")
    }
    save_classifier(result.model, result.config, job.model)
    parameters = int(result.metrics["trainable_parameters"])
    return {"seconds": round(seconds, 2), "trainable_parameters": parameters}, log_odds


def _adapted(run: Run) -> tuple[Path, float]:
    """The adapted backbone, which networks that are trained otherwise share, and the time it took."""
    params = run.params
    start = {"backbone", "weights", "height_px", "width_px", "fit", "freeze_norm"}
    key = config_hash(
        {
            "explora": params.explora.model_dump(mode="json"),
            "train": params.train.model_dump(mode="json", include=start),
            "fold": [run.fold.folder.parent.name, run.fold_number],
            "seed": run.seed,
        }
    )
    folder = run.scratch / "adapted" / key[:24]
    record = folder / "seconds.json"
    if not record.is_file():
        begun = time.perf_counter()
        adapt(params, run.fold, run.root, folder)
        write_json_atomic(record, {"seconds": time.perf_counter() - begun})
    return adapt(params, run.fold, run.root, folder), read_json(record, "explora")["seconds"]


def _views(
    model: RoadworkClassifier,
    preprocessing: Preprocessing,
    split: Split,
    condition: str,
    params: Params,
    grid: ViewGrid,
) -> ViewScores:
    """Scores of a split's images: as they are, or each in its versions as served, one after the other."""
    from streetvision.data.served_images import served_images
    from streetvision.models.classifier import pick_device
    from streetvision.models.multiview import score_all_views

    repeats = params.embed.served_repeats
    images = (
        (split.image(row) for row in range(len(split)))
        if condition == "clean"
        else served_images(split, params.subnet, repeats, SEED, 1)
    )
    device = pick_device(params.hardware.device)
    return score_all_views(model, preprocessing, images, grid, params.embed.batch_size, device)


def repeated(values: NDArray[Any], condition: str, params: Params) -> NDArray[Any]:
    """Labels or groups [N] of a split's images under a condition."""
    from streetvision.data.served_images import served_versions

    versions = served_versions(params.subnet, params.embed.served_repeats)
    return np.repeat(values, 1 if condition == "clean" else versions)


def _decide(job: Job) -> Found:
    """Fusion, chosen on VAL_SELECT, and decision rules fitted on VAL_CALIB, under `decision.fit_on`.

    The rules are fitted on the single logit and on the fused one, since only all runs together tell
    whether fusion is carried on. On VAL_CALIB they are out of fold.
    """
    from streetvision.decision.inputs import prior_shift
    from streetvision.fusion.fitting import LabelledViews, choose_fusion, learnt_scale
    from streetvision.models.classifier import load_classifier, pick_device

    params, fold = job.run.params, job.run.fold
    if job.network is None:
        raise ValueError("there is no network to score views with")
    start = time.perf_counter()
    model, config = load_classifier(job.network.model)
    head = model.head
    model = model.to(pick_device(params.hardware.device))
    fit_on = params.decision.fit_on

    def views(split: Split, condition: str) -> LabelledViews:
        scores = _views(model, config.preprocessing, split, condition, params, params.views)
        labels, groups = (
            repeated(values, condition, params) for values in (split.labels, split.groups)
        )
        return LabelledViews(scores, labels, groups)

    fusion_part, select, calib = (
        views(fold.open(name, "embed"), fit_on) for name in ("train", "val_select", "val_calib")
    )
    test = {name: views(fold.read("val_test"), name) for name in CONDITIONS}
    fusion, report = choose_fusion(
        params.cvfm, params.views, fusion_part, {fit_on: select}, fit_on, head.cpu(), 0.5,
        params.seed,
    )  # fmt: skip
    scale = learnt_scale(fusion, fusion_part)

    def bases(part: LabelledViews) -> dict[str, Floats]:
        return {SINGLE: part.scores.logits[:, 0], FUSED: fusion.fuse(*part.scores)}

    def shown(base: str, logits: Floats) -> Floats:
        """Before it is calibrated a rule of views gets the bias and scale that the others learnt."""
        return logits if SINGLE in (base, report["mode"]) else scale(logits)

    tests = {name: bases(part) for name, part in test.items()}
    log_odds: dict[str, dict[str, Floats]] = {
        "val_select": {f"{FUSED} {fit_on}": shown(FUSED, bases(select)[FUSED])},
        "val_calib": {},
        "val_test": {
            f"{base} {name}": shown(base, logits)
            for name, each in tests.items()
            for base, logits in each.items()
        },
    }
    moved = {}
    shift = prior_shift(float(calib.labels.mean()), params.decision.served_prior)
    for base, logits in bases(calib).items():
        log_odds["val_calib"][f"{base}/{MOVED}"] = shown(base, logits) + shift
        log_odds["val_test"] |= {
            f"{base}/{MOVED} {name}": shown(base, each[base]) + shift
            for name, each in tests.items()
        }
        for calibrator in dict.fromkeys((params.decision.calibrator, AUTO)):
            policy, held_out = _rules(logits, calib, calibrator, params)
            moved[f"{base}/{calibrator}"] = policy.threshold_shift != 0
            if held_out is not None:
                log_odds["val_calib"] |= {
                    rule(base, calibrator, stage): values
                    for stage, values in zip(STAGES, held_out, strict=True)
                }
            for name, each in tests.items():
                answers = policy.calibrated_logit(each[base]), policy.deployed_logit(each[base])
                log_odds["val_test"] |= {
                    f"{rule(base, calibrator, stage)} {name}": values
                    for stage, values in zip(STAGES, answers, strict=True)
                }
    seconds = round(time.perf_counter() - start, 2)
    found = {
        "mode": report["mode"], "views": fusion.n_views, "moved": moved, "seconds": seconds,
        "network": job.network.key,
    }  # fmt: skip
    return found, log_odds


def _rules(
    logits: Floats, calib: LabelledViews, calibrator: str, params: Params
) -> tuple[Any, tuple[Floats, Floats] | None]:
    from streetvision.decision.policy import fit_rule

    decision = params.decision
    policy, _ = fit_rule(
        logits, calib.labels == 1, calib.groups, decision.served_prior, decision.n_resamples,
        params.seed, calibrator,
    )  # fmt: skip
    return policy, rule_out_of_fold(logits, calib.labels, calib.groups, calibrator, params)
