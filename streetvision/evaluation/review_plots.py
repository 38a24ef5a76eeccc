"""Pictures for reviewing a change or a sweep, in the style of the evaluation's (`plots`); PNG bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

# Its helpers stay private: renaming them there would rerun every stage that draws.
from streetvision.evaluation.plots import ORANGE, _figure, _picture
from streetvision.evaluation.sweep_summary import Summary, as_text, key_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        ax.errorbar(len(axes), end, yerr=reach[rank] / scale, color=colour, fmt="o", capsize=3)
    for x, place in enumerate(places):
        for key, y in place.items():
            ax.text(x + 0.03, y + 0.02, as_text(json.loads(key)), fontsize=9)
    for value in np.linspace(low, high, 5):
        ax.text(len(axes) + 0.06, (value - low) / scale, f"{value:.4f}", fontsize=9, va="center")
    ax.vlines(range(len(axes) + 1), 0, 1, color="black", linewidth=1)
    ax.set_xticks(range(len(axes) + 1), [*axes, summary.metric.replace(":", ":\n")])
    ax.set_xlim(-0.1, len(axes) + 0.45)
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    end = "highest" if summary.highest else "lowest"
    ax.set_title(f"{len(means)} configurations; the {end} is best, in orange")
    return figure


def _heights(values: Iterable[Any]) -> dict[str, float]:
    """Distinct values from 0 to 1, numbers by size, others by name; a single one in the middle."""
    found = {key_of(value): value for value in values}
    numbers = all(isinstance(value, int | float) for value in found.values())
    order = sorted(found, key=lambda key: found[key] if numbers else key)
    return dict(zip(order, np.linspace(0, 1, len(order)) if len(order) > 1 else [0.5], strict=True))
