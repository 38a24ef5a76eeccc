"""Are new images of the distribution that a bundle was calibrated on? Labels are not needed.

Three comparisons of what the bundle says of both samples, as they are: the population stability index (PSI)
of the deployed probability, the two-sample Kolmogorov–Smirnov distance of the logits, and the squared maximum
mean discrepancy (MMD²) of the backbone's features. Each is judged by shuffling whole groups; drift is declared
where Holm's correction of the three leaves one p at or below `alpha`. How large it is, says the PSI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.errors import UserError
from streetvision.data.embeddings import read_embeddings
from streetvision.data.store import Split
from streetvision.plots.pictures import BLUE, GREY, ORANGE, _figure, _picture
from streetvision.review.drift import (
    Finding,
    Floats,
    holm,
    ks_distance,
    match_groups,
    mmd_test,
    psi,
    shuffle_groups,
    shuffle_test,
)
from streetvision.review.images import (
    Sample,
    embedded_sample,
    groups_known,
    is_embeddings,
    open_images,
    score_images,
    stored_side,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from streetvision.bundle.predictor import Predictor

# Siddiqi (2006), Credit Risk Scorecards: the customary reading of the PSI.
PSI_LEVELS = ((0.1, "small"), (0.25, "moderate"), (np.inf, "large"))
MAX_MMD_IMAGES = 2500  # of each sample: the kernel of all pairs takes their square
TESTS = ("psi_probability", "ks_logit", "mmd2_features")


def measure_drift(
    predictor: Predictor, new_data: Path, reference: Path, split: Split | None, alpha: float
) -> tuple[dict[str, Any], bytes]:
    """Compare images with a reference through a bundle; returns the report and its picture.

    Parameters
    ----------
    predictor
        Of the bundle.
    new_data, reference
        See `open_images`; the reference may also be a file of embeddings that the bundle's classifier made.
    split
        The images that reference embeddings are of; None leaves the properties out.
    alpha
        Share of false alarms allowed.

    Raises
    ------
    UserError
        As `open_images`, `embedded_sample` and `drift_report`.
    """
    preprocessing = predictor.config.preprocessing
    if is_embeddings(reference):
        known = embedded_sample(predictor, read_embeddings(reference, features=True), split)
        side = stored_side(split) if split is not None else None
    else:
        with open_images(reference, preprocessing) as images:
            known, side = score_images(predictor, images), stored_side(images)
    with open_images(new_data, preprocessing, side) as images:
        new = score_images(predictor, images)
    policy = predictor.policy
    report = drift_report(
        known, new, policy.deployed_probability, policy.accepts if policy.abstention else None,
        alpha=alpha,
    )  # fmt: skip
    report["sources"] = {"reference": str(reference), "new": str(new_data)}
    logits = (known.logits, new.logits)
    probability = (policy.deployed_probability(logits[0]), policy.deployed_probability(logits[1]))
    return report, plot_drift(probability, logits)


def drift_report(
    reference: Sample,
    new: Sample,
    probability: Callable[[Floats], Floats],
    accepts: Callable[[Floats], NDArray[np.bool_]] | None,
    *,
    permutations: int = 1000,
    alpha: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two samples; JSON whose `drift` says whether it is declared.

    Parameters
    ----------
    probability
        Logits [N] to deployed probabilities [N].
    accepts
        Logits [N] to whether the policy answers; None where it always does.
    permutations, alpha, seed
        Shuffles of whole groups, the share of false alarms allowed, and what the shuffles follow from.

    Raises
    ------
    UserError
        A sample of fewer than 2 images.
    """
    if min(len(reference.ids), len(new.ids)) < 2:
        raise UserError("drift needs at least 2 images of each sample")
    rng = np.random.default_rng(seed)
    samples = (reference, new)
    rows = match_groups(reference.groups, new.groups, rng)
    compared = [sample.take(each) for sample, each in zip(samples, rows, strict=True)]
    shuffles = shuffle_groups(compared[0].groups, compared[1].groups, permutations, rng)

    def judge(
        statistic: Callable[[Floats, Floats], float], of: Callable[[Sample], Floats]
    ) -> Finding:
        return shuffle_test(statistic, of(compared[0]), of(compared[1]), shuffles)

    found = {
        "psi_probability": judge(psi, lambda sample: probability(sample.logits)),
        "ks_logit": judge(ks_distance, lambda sample: sample.logits),
        "mmd2_features": _mmd(compared[0], compared[1], permutations, rng),
    }
    adjusted = holm([found[name].p for name in TESTS])
    p_both = [probability(each.logits) for each in samples]
    psi_all = psi(p_both[0], p_both[1])
    n_groups = [len(set(each.groups)) for each in samples]
    smallest = max(1 / (permutations + 1), 1 / comb(sum(n_groups), n_groups[1]))
    report: dict[str, Any] = {
        "images": _both(*(len(each.ids) for each in samples)),
        "compared": _both(*(len(each.ids) for each in compared)),
        "groups": _both(*n_groups) | {"known": all(groups_known(each.groups) for each in samples)},
        "tests": {
            name: {**found[name]._asdict(), "p_holm": value}
            for name, value in zip(TESTS, adjusted, strict=True)
        },
        "ks_logit_p_independent": _independent_p(reference.logits, new.logits),
        "alpha": alpha,
        "smallest_p": smallest,
        "decidable": smallest * len(TESTS) <= alpha,
        "drift": min(adjusted) <= alpha,
        "answers_moved": min(found[name].p for name in TESTS[:2]) <= alpha,
        "psi": psi_all,
        "size": psi_level(psi_all),
        "mean_probability": _both(*(float(p.mean()) for p in p_both)),
        "share_positive": _both(*(float((p > 0.5).mean()) for p in p_both)),
    }
    if accepts is not None:
        rejected = [(~accepts(each.logits)).astype(np.float64) for each in samples]
        test = judge(_mean_distance, lambda each: (~accepts(each.logits)).astype(np.float64))
        report["share_rejected"] = _both(*(float(x.mean()) for x in rejected)) | {"p": test.p}
    names = [name for name in reference.properties if name in new.properties]
    tested = {name: judge(psi, _property(name)) for name in names}
    adjusted = holm([each.p for each in tested.values()])
    report["properties"] = {
        name: _both(*(float(np.median(each.properties[name])) for each in samples))
        | {"psi": test.value, "chance": test.chance, "p": test.p, "p_holm": p}
        for (name, test), p in zip(tested.items(), adjusted, strict=True)
    }
    return report | {"meaning": " ".join(meaning(report))}


def psi_level(value: float) -> str:
    """The customary word for a PSI: below 0.1, to 0.25, above."""
    return next(name for bound, name in PSI_LEVELS if value < bound)


def meaning(report: Mapping[str, Any]) -> list[str]:
    """Say in sentences what a report means and what to do."""
    new = report["groups"]["new"]
    value = report["psi"]
    said = []
    if not report["decidable"]:
        said.append(
            f"Undecided: {new} group{'s' * (new > 1)} of new images cannot give a p below "
            f"{report['smallest_p']:.2g}, so nothing can be told from how groups differ anyway; "
            "give images of more groups."
        )
    elif not report["drift"]:
        said.append("No drift that this many groups could tell.")
    elif not report["answers_moved"]:
        said.append(
            "DRIFT in what the images show; a shift of the answers could not be told. Look at the "
            "images; the bundle may serve on."
        )
    elif report["size"] == "small":
        said.append(
            f"DRIFT, but the answers hardly moved (PSI {value:.2f} < 0.1): look at the images; "
            "the bundle may serve on."
        )
    elif report["size"] == "moderate":
        said.append(
            f"DRIFT, and the answers moved (PSI {value:.2f}, 0.1 to 0.25): label some of the new "
            "images and `evaluate` the bundle on them."
        )
    else:
        said.append(
            f"DRIFT, and the answers are others (PSI {value:.2f} > 0.25): calibration and metrics "
            "of the bundle do not speak for these images; label some, `evaluate`, and calibrate or "
            "train anew."
        )
    if report["drift"]:
        odd = [n for n, each in report["properties"].items() if each["p_holm"] <= report["alpha"]]
        odd.sort(key=lambda name: -report["properties"][name]["psi"])
        if odd:
            said.append(f"The images differ in {', '.join(odd).replace('_', ' ')}.")
        said.append(
            "More or less roadwork than before moves the answers, too; only labels tell that "
            "from a bundle that errs."
        )
    if not report["groups"]["known"]:
        said.append(
            "The groups of a sample are not known, so its images count as independent: if they are "
            "frames of a few drives, p is too small."
        )
    return said


def render(report: Mapping[str, Any]) -> str:
    """What `measure_drift` reports, as text for a terminal."""
    images, groups = report["images"], report["groups"]
    lines = [
        *(
            f"{f'{name}:':11}{images[name]:,} images of {groups[name]:,} groups, {report['sources'][name]}"
            for name in ("reference", "new")
        ),
        "groups cut to equal sizes: {reference:,} and {new:,} images".format(**report["compared"]),
        f"{'':26}{'value':>9}{'95 % by chance':>16}{'p':>8}{'p, Holm':>9}",
    ]
    names = ("PSI of the probability", "KS distance of the logits", "MMD² of the features")
    for title, name in zip(names, TESTS, strict=True):
        test = report["tests"][name]
        lines.append(
            f"{title:26}{test['value']:9.4f}{test['chance']:16.4f}{test['p']:8.4f}{test['p_holm']:9.4f}"
        )
    levels = "below 0.1 small, to 0.25 moderate, above large; Siddiqi 2006"
    lines += [
        f"PSI of all images: {report['psi']:.3f}, {report['size']} ({levels})",
        f"KS of all images, as if independent: p = {report['ks_logit_p_independent']:.2g}",
    ]
    lines.append(f"{'':26}{'reference':>9}{'new':>16}")
    for title, name in (
        ("mean probability", "mean_probability"), ("share positive", "share_positive"),
        ("rejected by the policy", "share_rejected"),
    ):  # fmt: skip
        if name in report:
            lines.append(f"{title:26}{report[name]['reference']:9.3f}{report[name]['new']:16.3f}")
    if "share_rejected" not in report:
        lines.append("rejected by the policy: none, it has no acceptance band")
    if report["properties"]:
        lines.append(f"{'median':26}{'reference':>9}{'new':>16}{'PSI':>8}{'p, Holm':>9}")
    for name, row in report["properties"].items():
        lines.append(
            f"{name.replace('_', ' '):26}{row['reference']:9.3f}{row['new']:16.3f}"
            f"{row['psi']:8.3f}{row['p_holm']:9.4f}"
        )
    lines.append(report["meaning"])
    return "\n".join(lines)


@_picture
def plot_drift(probability: tuple[Floats, Floats], logits: tuple[Floats, Floats]) -> Figure:
    """Histograms of the deployed probability and of the logit, reference [N] and new [M], as shares."""
    figure, axes = _figure(8.4, 3.6, ncols=2)
    pooled = np.concatenate(logits)
    ends = (float(pooled.min()), float(pooled.max() + 1e-9))
    panels = (
        (probability, (0.0, 1.0), "deployed probability"), (logits, ends, "logit"),
    )  # fmt: skip
    for ax, (samples, (low, high), title) in zip(axes, panels, strict=True):
        edges = np.linspace(low, high, 21)
        for values, name, colour in zip(samples, ("reference", "new"), (BLUE, ORANGE), strict=True):
            share = np.histogram(values, edges)[0] / len(values)
            ax.stairs(share, edges, fill=True, alpha=0.5, color=colour, label=name)
        ax.set(title=title, ylabel="share of images")
    axes[0].axvline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes[0].legend(loc="upper center")
    return figure


def _both(reference: float, new: float) -> dict[str, Any]:
    return {"reference": reference, "new": new}


def _mmd(reference: Sample, new: Sample, permutations: int, rng: np.random.Generator) -> Finding:
    rows = [_some_groups(each.groups, rng) for each in (reference, new)]
    groups = [each.groups[kept] for each, kept in zip((reference, new), rows, strict=True)]
    shuffles = shuffle_groups(groups[0], groups[1], permutations, rng)
    return mmd_test(reference.features[rows[0]], new.features[rows[1]], shuffles, rng)


def _some_groups(groups: NDArray[np.object_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Rows of groups, whole and drawn at random, that hold at most `MAX_MMD_IMAGES`; of one at least."""
    codes = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(codes)
    order = rng.permutation(len(sizes))
    kept = np.zeros(len(sizes), dtype=np.bool_)
    kept[order] = np.cumsum(sizes[order]) <= MAX_MMD_IMAGES
    kept[order[0]] = True
    return np.asarray(kept[codes])


def _property(name: str) -> Callable[[Sample], Floats]:
    return lambda sample: sample.properties[name]


def _mean_distance(reference: Floats, new: Floats) -> float:
    return abs(float(new.mean() - reference.mean()))


def _independent_p(reference: Floats, new: Floats) -> float:
    from scipy.stats import ks_2samp

    return float(ks_2samp(reference, new, method="asymp").pvalue)
