"""One split: trained, embedded with views, fused, calibrated, decided; what each step does on VAL_TEST.

Nothing is chosen on VAL_TEST: fusion's mode is on VAL_SELECT, the calibrator out of folds of VAL_CALIB. After
training all of it is done under each condition: with that `decision.fit_on`, tested on such images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import config_hash
from streetvision.core.params import Params
from streetvision.core.schema import CONDITIONS
from streetvision.data.store import Split
from streetvision.studies.data import Fold
from streetvision.studies.runs import train

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.fusion.fitting import LabelledViews
    from streetvision.stats.bootstrap import Interval

Floats = NDArray[np.float64]

STEPS = ("single", "fused", "calibrated", "deployed", "calibrated_auto", "deployed_auto")
METRICS = ("mcc", "log_loss", "ece", "ece_debiased")
# The calibrator of the parameters, and the one with the lowest out-of-fold log loss.
DEFAULT, AUTO = "default", "auto"


@dataclass(frozen=True)
class Run:
    """One split, or one part of the groups held out.

    `number` is the seed of the split or, of a held-out part, the quarter of the others that is VAL_SELECT;
    `part` is the number of the part.
    """

    data: str
    kind: str
    number: int
    params: Params
    source: Path
    root: Path
    scratch: Path
    code: str
    part: int = 0

    @property
    def key(self) -> str:
        """Parameters and data of the run; not the code, whose version the line records beside it."""
        params = self.params.model_dump(
            mode="json", exclude={"data", "gates", "hardware", "export"}
        )
        return config_hash(
            {
                "kind": self.kind,
                "number": self.number,
                "part": self.part,
                "source": self.source.relative_to(self.scratch).as_posix(),
                "params": params,
            }
        )[:24]


def run_split(run: Run) -> dict[str, Any]:
    """Train, fuse, calibrate and decide on one split; the numbers of its line.

    Raises
    ------
    UserError
        The data are too few for some step.
    """
    from streetvision.data.served_images import served_images, served_versions
    from streetvision.decision.report import sweep_thresholds
    from streetvision.fusion.fitting import LabelledViews, choose_fusion, learnt_scale
    from streetvision.fusion.fusion import Fusion, FusionConfig
    from streetvision.models.classifier import pick_device
    from streetvision.models.multiview import score_all_views

    params, fold = run.params, Fold(run.source)
    device = pick_device(params.hardware.device)
    result = train(params, fold, run.root, run.scratch / "running" / run.key)
    model = result.model.to(device).eval()

    def views(split: Split, condition: str, repeats: int) -> LabelledViews:
        if condition == "clean":
            images: Iterator[Image] = (split.image(row) for row in range(len(split)))
        else:
            images = served_images(split, params.subnet, repeats, params.seed, 1)
            versions = served_versions(params.subnet, repeats)
            split = split.select(np.repeat(np.arange(len(split)), versions))
        scores = score_all_views(
            model, result.config.preprocessing, images, params.views, params.embed.batch_size,
            device,
        )  # fmt: skip
        return LabelledViews(scores, split.labels, split.groups)

    fusion_part, select, calib = (
        {
            condition: views(fold.open(name, "embed"), condition, params.embed.served_repeats)
            for condition in CONDITIONS
        }
        for name in ("train", "val_select", "val_calib")
    )
    test = {name: views(fold.open("val_test", "evaluate"), name, 1) for name in CONDITIONS}
    clean = calib["clean"]
    swept, _ = sweep_thresholds(
        clean.scores.logits[:, 0], clean.labels, clean.groups,
        n_thresholds=params.sweep.n_thresholds, selection=params.sweep.selection,
        n_resamples=params.decision.n_resamples, seed=params.seed, split_used="val_calib",
    )  # fmt: skip
    head = model.head.cpu()
    single = Fusion(FusionConfig.of("single", params.cvfm, params.views, 0))
    line: dict[str, Any] = {"conditions": {}}
    for name in CONDITIONS:
        fusion, report = choose_fusion(
            params.cvfm, params.views, fusion_part[name], select, name, head, swept["threshold"],
            params.seed,
        )  # fmt: skip
        # Rules without training are compared with the bias and scale that the calibrator will give them.
        judged = select[name]
        pair = [
            learnt_scale(f, fusion_part[name])(f.fuse(*judged.scores)) for f in (single, fusion)
        ]
        gain = compare(judged.labels, judged.groups, pair[0], pair[1], params)
        decided = decide(
            fusion.fuse(*calib[name].scores), calib[name], fusion.fuse(*test[name].scores),
            test[name], params,
        )  # fmt: skip
        chosen = {"mode": report["mode"], "modes": report["modes"], **gain}
        line["conditions"][name] = {"fusion": chosen, **decided}
    parts = {
        "TRAIN, fusion part": fusion_part["clean"], "VAL_SELECT": select["clean"],
        "VAL_CALIB": clean, "VAL_TEST": test["clean"],
    }  # fmt: skip
    line["images"] = {name: len(part.labels) for name, part in parts.items()}
    line["groups"] = {name: len(set(part.groups)) for name, part in parts.items()}
    return line


def decide(
    calib_logits: Floats,
    calib: LabelledViews,
    test_logits: Floats,
    test: LabelledViews,
    params: Params,
) -> dict[str, Any]:
    """Fit the policy on fused VAL_CALIB logits, by the default calibrator and by `auto`; report all steps.

    All of them, the uncalibrated ones, too, are moved from VAL_CALIB's prior to the served one.
    """
    from streetvision.decision.inputs import prior_shift, sigmoid
    from streetvision.decision.policy import fit_rule

    decision = params.decision
    moved = prior_shift(float(calib.labels.mean()), decision.served_prior)
    probabilities = {
        "single": sigmoid(test.scores.logits[:, 0] + moved), "fused": sigmoid(test_logits + moved)
    }  # fmt: skip
    found: dict[str, Any] = {"out_of_fold": {}, "calibrator": {}, "threshold_shift": {}}
    for name, suffix in ((decision.calibrator, ""), (AUTO, f"_{AUTO}")):
        arguments = (decision.served_prior, decision.n_resamples, params.seed, name)
        policy, _ = fit_rule(calib_logits, calib.labels == 1, calib.groups, *arguments)
        probabilities[f"calibrated{suffix}"] = policy.calibrated_probability(test_logits)
        probabilities[f"deployed{suffix}"] = policy.deployed_probability(test_logits)
        label = AUTO if suffix else DEFAULT
        found["calibrator"][label] = policy.calibrator.kind
        found["threshold_shift"][label] = policy.threshold_shift
        found["out_of_fold"][label] = _out_of_fold(calib_logits, calib, name, params)
    found["steps"] = {
        step: measured(test.labels, probabilities[step], test.groups, params) for step in STEPS
    }
    return found


def _out_of_fold(
    logits: Floats, calib: LabelledViews, calibrator: str, params: Params
) -> dict[str, Any]:
    """VAL_CALIB at the served prior, before and after a deployed rule that did not see the group.

    Both moved there from VAL_CALIB's own, so that they differ by the rule alone.
    """
    from streetvision.decision.inputs import prior_shift

    found = rule_out_of_fold(logits, calib.labels, calib.groups, calibrator, params)
    if found is None:
        return {}
    moved = logits + prior_shift(float(calib.labels.mean()), params.decision.served_prior)
    return compare(calib.labels, calib.groups, moved, found[1], params)


def rule_out_of_fold(
    logits: Floats,
    labels: NDArray[np.int64],
    groups: NDArray[Any],
    calibrator: str,
    params: Params,
) -> tuple[Floats, Floats] | None:
    """Calibrated and deployed log-odds [N] of rules that did not see the group; None without folds."""
    from streetvision.decision.folds import group_folds
    from streetvision.decision.policy import fit_rule

    truth, decision = labels == 1, params.decision
    calibrated, deployed = np.full(len(logits), np.nan), np.full(len(logits), np.nan)
    for held in group_folds(truth, groups, params.seed):
        policy, _ = fit_rule(
            logits[~held], truth[~held], groups[~held], decision.served_prior,
            decision.n_resamples, params.seed, calibrator,
        )  # fmt: skip
        calibrated[held] = policy.calibrated_logit(logits[held])
        deployed[held] = policy.deployed_logit(logits[held])
    return (calibrated, deployed) if np.isfinite(calibrated).all() else None


def compare(
    labels: NDArray[np.int64], groups: NDArray[Any], before: Floats, after: Floats, params: Params
) -> dict[str, Any]:
    """MCC and log loss of two log-odds [N] at the served prior; their differences paired over groups."""
    from streetvision.decision.inputs import sigmoid
    from streetvision.stats.bootstrap import paired_group_interval
    from streetvision.stats.metrics import all_metrics, prior_weights

    prior = params.decision.served_prior
    weights = prior_weights(labels, prior)
    pair = [sigmoid(before), sigmoid(after)]
    found: dict[str, Any] = {}
    for name, values in zip(("before", "after"), pair, strict=True):
        scores = all_metrics(labels, values, weights)
        found[name] = {metric: scores[metric] for metric in METRICS}
    for metric in ("mcc", "log_loss"):
        gain = paired_group_interval(
            labels, pair[0], pair[1], groups, metric, prior, params.evaluate.n_resamples,
            seed=params.seed,
        )  # fmt: skip
        found[f"gain_{metric}"] = as_dict(gain)
    return found


def measured(
    labels: NDArray[np.int64], probabilities: Floats, groups: NDArray[Any], params: Params
) -> dict[str, Any]:
    """The metrics of a split at the served prior with intervals over groups, and ECE's noise floor."""
    from streetvision.stats.bootstrap import group_intervals
    from streetvision.stats.metrics import ece_noise_floor, prior_weights

    prior = params.decision.served_prior
    found = group_intervals(
        labels, probabilities, groups, prior, params.evaluate.n_resamples, seed=params.seed,
        metrics=METRICS,
    )  # fmt: skip
    floor = ece_noise_floor(labels, probabilities, prior_weights(labels, prior), seed=params.seed)
    return {name: as_dict(found[name]) for name in METRICS} | {
        "noise_floor": floor.mean,
        "noise_floor_upper": floor.upper,
    }


def as_dict(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON; no bounds where there are none."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}
