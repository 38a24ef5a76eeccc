"""Calibration of the bundle on new cities: scenes of another seed, rendered for this and never seen.

Even a perfectly calibrated model's upper bound on ECE is below 0.02 only from about 20,000 images, which
no split of the project has.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streetvision.core.artifacts import (
    config_hash,
    exclusive,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError
from streetvision.core.params import Params, SyntheticSource
from streetvision.core.progress import progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.bundle.predictor import Predictor
    from streetvision.data.store import Split

log = logging.getLogger(__name__)
# Added to the project's seed: every city and every scene is another.
SEED_OFFSET = 1_000_000
ECE_TARGET = 0.02


def fresh_params(params: Params, images: int, cities: int) -> Params:
    """The project's data with so many scenes of so many cities, of another seed.

    Raises
    ------
    UserError
        The project's data are not rendered scenes.
    """
    sources = params.data.sources
    if len(sources) != 1 or not isinstance(sources[0], SyntheticSource):
        raise UserError(
            "params.yaml: data.sources are not rendered scenes; new ones cannot be made"
        )
    source = sources[0].model_dump() | {"images": images, "cities": cities}
    document = params.model_dump() | {"seed": params.seed + SEED_OFFSET}
    document["data"] |= {"sources": [source]}
    return Params.model_validate(document)


def measure(
    bundle: Path, params: Params, images: int, cities: int, scratch: Path, workers: int
) -> dict[str, Any]:
    """Render, prepare and score `images` scenes of `cities` new cities; the reports of `evaluate` on them.

    One is of the `calibrated` probability, one of the `deployed`: its log-odds are moved by `threshold_shift`.
    The images are under the condition that the bundle's policy was fitted on: as they are, or distorted as
    the validator does. A rerun with the same scenes does not render them again.

    Raises
    ------
    UserError
        No bundle, or the project's data are not rendered scenes.
    """
    from streetvision.bundle.predictor import Predictor
    from streetvision.bundle.validate import BUNDLE_JSON
    from streetvision.evaluation.report import evaluation_report
    from streetvision.studies.data import prepare_all

    predictor = Predictor.load(bundle, params.hardware.device)
    fresh = fresh_params(params, images, cities)
    key = config_hash({"data": fresh.data.model_dump(mode="json"), "seed": fresh.seed})[:16]
    with exclusive(scratch / "lock", f"another process is at work in {scratch}"):
        for other in scratch.glob("scenes-*"):
            if other.name != f"scenes-{key}":
                shutil.rmtree(other)
        path = prepare_all(fresh.data, Path(), scratch / f"scenes-{key}", workers, fresh.seed)
        split = _open(path)
        logits = predictor.logits(_images(predictor, split, fresh, workers))
    policy = predictor.policy
    found = {
        "calibrated": policy.calibrated_probability(logits),
        "deployed": policy.deployed_probability(logits),
    }
    reports = {
        name: evaluation_report(
            split.labels, probabilities, split.groups, {}, params.decision.served_prior, params.seed,
            params.evaluate.n_resamples,
        )
        for name, probabilities in found.items()
    }  # fmt: skip
    return reports | {
        "threshold_shift": policy.threshold_shift,
        "condition": predictor.policy.fit_on,
        "cities": cities,
        "seed": fresh.seed,
        "bundle_sha256": sha256_file(bundle / BUNDLE_JSON),
    }


def _open(path: Path) -> Split:
    from streetvision.data.store import open_split

    return open_split("evaluate", "val_test", path)


def _images(predictor: Predictor, split: Split, params: Params, workers: int) -> Iterator[Image]:
    from streetvision.data.served_images import served_images

    if predictor.policy.fit_on == "served":
        return served_images(split, params.subnet, 1, params.seed, workers)
    return (split.image(row) for row in progress(range(len(split)), len(split), "scoring"))


_TEXT = """\
# Calibration on new cities

Written by `{command}`; no number here is typed by hand. {n:,} scenes ({condition}, what its \
policy was fitted on: `decision.fit_on: {fit_on}`) of {cities} cities that nobody has seen (seed {seed}), \
{n_groups:,} groups, which tell as much as {effective:.1f} of equal size, \
through the bundle `{bundle}`. At the served prior {served_prior:g}; 95 % intervals \
count groups. The deployed log-odds are the calibrated ones \
{shift:+.3f}, which moves the threshold that is best for MCC on VAL_CALIB to 0.5.

| | calibrated | interval | deployed | interval |
|---|---|---|---|---|
{rows}

ECE has {bins} bins; a perfectly calibrated model of this size would show {floor:.4f}, in 95 % of all samples \
less than {floor_upper:.4f}. The upper bound of debiased ECE, calibrated, is {high:.4f}: {verdict} {target}.
"""
_ROWS = {
    "mcc": "MCC", "accuracy": "accuracy", "log_loss": "log loss", "ece": "ECE",
    "ece_debiased": "debiased ECE",
}  # fmt: skip


def write_report(found: dict[str, Any], out: Path, command: str) -> str:
    """Write the document and, beside it, the numbers; returns the sentence about the target.

    Raises
    ------
    UserError
        Too few groups for an interval of the debiased ECE.
    """
    both = [found["calibrated"], found["deployed"]]
    report = both[0]
    if any("ece_debiased" not in each["served_interval"] for each in both):
        raise UserError(
            f"{report['n_groups']} groups give no interval of the debiased ECE; more cities are needed"
        )
    rows = []
    for name, label in _ROWS.items():
        cells = []
        for each in both:
            ends = each["served_interval"].get(name)
            text = "none" if ends is None else f"[{ends['low']:.4f}, {ends['high']:.4f}]"
            cells += [f"{each['served'][name]:.4f}", text]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    high, detail = report["served_interval"]["ece_debiased"]["high"], report["ece_detail"]
    condition = {"clean": "as they are", "served": "as the validator sends them"}
    text = _TEXT.format(
        command=command, n=report["n"], condition=condition[found["condition"]],
        fit_on=found["condition"],
        cities=found["cities"], seed=found["seed"], n_groups=report["n_groups"],
        bundle=found["bundle_sha256"][:12], served_prior=report["served_prior"],
        effective=min(report["effective_groups"].values()),
        shift=found["threshold_shift"], rows="\n".join(rows), bins=detail["bins"],
        floor=detail["noise_floor"], floor_upper=detail["noise_floor_upper"], high=high,
        target=ECE_TARGET, verdict="below" if high < ECE_TARGET else "not below",
    )  # fmt: skip
    write_json_atomic(out.with_suffix(".json"), found)
    write_bytes_atomic(out, text.encode())
    return text.strip().splitlines()[-1]
