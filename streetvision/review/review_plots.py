"""Pictures for reviewing a change or a sweep, in the style of the evaluation's (`plots`); PNG bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streetvision.core.escaping import caption
from streetvision.plots.pictures import BLUE, GREY, ORANGE, _figure, _picture
from streetvision.review.sweep_summary import Summary, as_text, key_of
from streetvision.stats.metrics import (
    N_BINS,
    Floats,
    Integers,
    all_metrics,
    curve_counts,
    equal_width_bins,
    prior_weights,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (GREY, BLUE)  # of base and head


@_picture
def plot_parallel_coordinates(summary: Summary) -> Figure:
    """An axis for each varied parameter, its values evenly spaced, and one for the metric.

    A line is a configuration, the darker the better, the best one orange; bars are ± one standard
    deviation over seeds.
    """
    from matplotlib import colormaps

    axes = list(summary.best.params)
    means = np.array([each.score.mean for each in summary.configurations])
    reach = np.array([each.score.sd or 0.0 for each in summary.configurations])
    low, high = float((means - reach).min()), float((means + reach).max())
    scale = (high - low) or 1.0
    figure, ax = _figure(1.9 * len(axes) + 3.6, 4.2)
    places = [_heights(each.params[axis] for each in summary.configurations) for axis in axes]
    for rank in reversed(range(len(means))):
        params = summary.configurations[rank].params
        heights = [place[key_of(params[axis])] for axis, place in zip(axes, places, strict=True)]
        shade = 0.9 - 0.6 * rank / max(len(means) - 1, 1)
        colour = ORANGE if rank == 0 else colormaps["Blues"](shade)
        end = (means[rank] - low) / scale
        ax.plot([*heights, end], color=colour, linewidth=3 if rank == 0 else 1.5)
        # Side by side, so that no bar hides another.
        place_of_bar = len(axes) + 0.02 * rank
        ax.errorbar(place_of_bar, end, yerr=reach[rank] / scale, color=colour, fmt="o", capsize=3)
    for x, place in enumerate(places):
        for key, y in place.items():
            ax.text(x + 0.03, y + 0.02, caption(as_text(json.loads(key)), 24), fontsize=9)
    for value in np.linspace(low, high, 5):
        ax.text(
            len(axes) + 0.02 * len(means) + 0.05,
            (value - low) / scale,
            f"{value:.4f}",
            fontsize=9,
            va="center",
        )
    ax.vlines(range(len(axes) + 1), 0, 1, color="black", linewidth=1, zorder=0)
    metric = "\n".join(caption(part, 40) for part in summary.metric.split(":"))
    ax.set_xticks(range(len(axes) + 1), [*(caption(axis, 30) for axis in axes), metric])
    ax.set_xlim(-0.1, len(axes) + 0.45)
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    end = "highest" if summary.highest else "lowest"
    ax.set_title(f"{len(means)} configurations; the {end} is best, in orange")
    return figure


@_picture
def overlay_roc(labels: Integers, models: Mapping[str, Floats]) -> Figure:
    """ROC curves of one or two models by name, base first, on the same labels [N]; p > 0.5 marked."""
    figure, ax = _figure(5.2, 5.0)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="chance")
    for (name, p), colour in zip(models.items(), _COLOURS, strict=False):
        values = all_metrics(labels, p)
        _, tp, fp = curve_counts(labels, p)
        curve = np.append(0, fp / fp[-1]), np.append(0, tp / tp[-1])
        ax.plot(*curve, color=colour, label=f"{name}, AUC {values['roc_auc']:.4f}")
        ax.plot(values["fpr"], values["recall"], "o", color=colour)
    ax.set(xlabel="false positive rate", ylabel="true positive rate")
    ax.set_title(f"ROC, {len(labels):,} images; dots: p > 0.5")
    _unit_square(ax)
    ax.legend(loc="lower right")
    return figure


@_picture
def overlay_precision_recall(
    labels: Integers, models: Mapping[str, Floats], served_prior: float
) -> Figure:
    """Precision over recall of one or two models, base first, at the served prior in (0, 1)."""
    weights = prior_weights(labels, served_prior)
    odds = weights[labels == 0][0] / weights[labels == 1][0]
    figure, ax = _figure(5.2, 5.0)
    for (name, p), colour in zip(models.items(), _COLOURS, strict=False):
        values = all_metrics(labels, p, weights)
        _, tp, fp = curve_counts(labels, p)
        curve = np.append(0, tp / tp[-1]), np.append(1, tp / (tp + odds * fp))
        ax.plot(*curve, color=colour, drawstyle="steps-pre",
                label=f"{name}, AP {values['pr_auc']:.4f}")  # fmt: skip
        if "precision" in values:
            ax.plot(values["recall"], values["precision"], "o", color=colour)
    ax.axhline(served_prior, color=GREY, linestyle="--", linewidth=1, label="no skill")
    ax.set(xlabel="recall", ylabel="precision")
    ax.set_title(f"Precision and recall, {served_prior:.0%} positive; dots: p > 0.5")
    _unit_square(ax)
    ax.legend(loc="lower left")
    return figure


@_picture
def overlay_reliability(
    labels: Integers, models: Mapping[str, Floats], served_prior: float
) -> Figure:
    """Share of positives over mean probability in the bins of the ECE, and the images in each bin."""
    weights = prior_weights(labels, served_prior)
    figure, (ax, below) = _figure(
        5.2, 6.2, nrows=2, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]}
    )
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    edges = np.linspace(0, 1, N_BINS + 1)
    for (name, p), colour in zip(models.items(), _COLOURS, strict=False):
        bins = equal_width_bins(p)
        mass, hits, total = (
            np.bincount(bins, x, minlength=N_BINS) for x in (weights, weights * labels, weights * p)
        )
        used = mass > 0
        ece = all_metrics(labels, p, weights)["ece"]
        ax.plot(total[used] / mass[used], hits[used] / mass[used], "o-", color=colour,
                linewidth=1.2, label=f"{name}, ECE {ece:.4f}")  # fmt: skip
        below.stairs(np.bincount(bins, minlength=N_BINS), edges, color=colour)
    ax.set(ylabel="share of positives")
    ax.set_title(f"Reliability, {len(labels):,} images, {served_prior:.0%} positive")
    _unit_square(ax)
    ax.legend(loc="upper left")
    below.set(xlabel="probability of roadwork", ylabel="images")
    return figure


@_picture
def overlay_mcc_curves(curves: Mapping[str, Sequence[Floats]]) -> Figure:
    """MCC over the threshold of one or two models, base first: thresholds [T] and MCC [T] by name."""
    figure, ax = _figure(6.4, 4.0)
    for (name, (thresholds, mcc)), colour in zip(curves.items(), _COLOURS, strict=False):
        best = int(np.argmax(mcc))
        ax.plot(thresholds, mcc, color=colour,
                label=f"{name}, best {mcc[best]:.4f} at {thresholds[best]:.3f}")  # fmt: skip
        ax.plot(thresholds[best], mcc[best], "o", color=colour)
    ax.set(xlabel="threshold (positive: p > threshold)", ylabel="MCC", xlim=(0, 1))
    ax.set_title("MCC over the threshold, one view, before calibration")
    ax.legend(loc="lower center")
    return figure


def _heights(values: Iterable[Any]) -> dict[str, float]:
    """Distinct values from 0 to 1, numbers by size, others by name; a single one in the middle."""
    found = {key_of(value): value for value in values}
    numbers = all(isinstance(value, int | float) for value in found.values())
    order = sorted(found, key=lambda key: found[key] if numbers else key)
    return dict(zip(order, np.linspace(0, 1, len(order)) if len(order) > 1 else [0.5], strict=True))


def _unit_square(ax: Axes) -> None:
    # A little room, so that lines along the border can be seen.
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
