"""The evaluation's pictures. Each function returns the bytes of a PNG; the caller writes them.

Figures are made without pyplot, with matplotlib's defaults whatever the user's configuration, and
saved without a date or version: the same input gives the same bytes.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import ArrayLike

from streetvision.core.errors import UserError
from streetvision.core.escaping import caption

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120
MOST_LINES = 4  # of a caption
BLUE, ORANGE, GREEN, GREY = "#2367a8", "#d9731a", "#3b8f4c", "#8a8f98"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "text.parse_math": False,  # a name with two dollar signs is no formula
}
P = ParamSpec("P")


def figure_to_png(figure: Figure) -> bytes:
    """Render a figure at a fixed resolution with 256 colours, without any metadata."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(DPI)
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font does not have: boxes, without a line for each of them.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        canvas.draw()  # type: ignore[no-untyped-call]
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
    # A palette takes a third of the bytes: Git keeps every version of these pictures.
    image.quantize(256, Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _picture(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Run a drawing function in the house style and render what it returns."""

    @wraps(draw)
    def render(*args: P.args, **kwargs: P.kwargs) -> bytes:
        import matplotlib as mpl

        # Most settings are read when an artist is made, some when it is drawn.
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            return figure_to_png(draw(*args, **kwargs))

    return render


@_picture
def plot_confusion(tp: int, fp: int, tn: int, fn: int) -> Figure:
    """Confusion matrix: counts and the share of each row, that is of each true class."""
    counts = np.array([[tn, fp], [fn, tp]])
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros((2, 2)), where=total > 0)
    figure, ax = _figure(4.8, 4.4)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1.15)
    for (row, column), count in np.ndenumerate(counts):
        ax.text(
            column,
            row,
            f"{count:,}\n{share[row, column]:.1%}",
            ha="center",
            va="center",
            fontsize=15,
            color="white" if share[row, column] > 0.55 else "black",
        )
    names = ["no roadwork", "roadwork"]
    ax.set_xticks([0, 1], names)
    ax.set_yticks([0, 1], names, rotation=90, va="center")
    ax.set(xlabel="predicted (p > 0.5)", ylabel="true", title="Confusion: images, share of the row")
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


@_picture
def plot_mistakes(
    images: Sequence[Any], captions: Sequence[str], title: str = "Worst mistakes"
) -> Figure:
    """Contact sheet of images (PIL or uint8 [H, W, 3]), four to a row, each under its caption.

    One line of text where there are none.
    """
    if len(images) != len(captions):
        raise UserError(f"{len(images)} images but {len(captions)} captions; one each is needed")
    if not images:
        figure, ax = _figure(5.0, 1.2)
        ax.set_axis_off()
        ax.text(0.5, 0.5, f"{title}: none", ha="center", va="center", transform=ax.transAxes)
        return figure
    n_columns = min(4, len(images))
    n_rows = -(-len(images) // n_columns)
    arrays = [np.asarray(image) for image in images]
    tallest = max(array.shape[0] / array.shape[1] for array in arrays)
    figure, axes = _figure(
        2.2 * n_columns,
        (2.2 * tallest + 0.35) * n_rows + 0.4,
        nrows=n_rows,
        ncols=n_columns,
        squeeze=False,
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, array, words in zip(axes.flat, arrays, captions, strict=False):
        ax.imshow(array, cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        lines = [caption(line) for line in words.split("\n")][:MOST_LINES]
        text = "\n".join(textwrap.fill(line, 34) for line in lines)
        ax.set_title(text, fontsize=9, fontweight="normal", loc="center")
    figure.suptitle(caption(title), fontsize=12, fontweight="bold")
    return figure


@_picture
def plot_threshold_sweep(
    thresholds: ArrayLike,
    mcc: ArrayLike,
    tp: ArrayLike,
    tn: ArrayLike,
    fp: ArrayLike,
    fn: ArrayLike,
    best_threshold: float,
) -> Figure:
    """MCC over the threshold, the chosen one marked, and the confusion counts below; all [T]."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (thresholds, mcc))
    at_best = float(np.interp(best_threshold, x, y))
    figure, (ax, below) = _figure(6.4, 6.2, nrows=2, sharex=True)
    ax.plot(x, y, color=BLUE)
    ax.axvline(best_threshold, color=ORANGE, linewidth=1)
    ax.plot(best_threshold, at_best, "o", color=ORANGE)
    ax.set(ylabel="MCC", title=f"Threshold {best_threshold:.3f}: MCC {at_best:.4f}")
    ax.set_xlim(0, 1)
    for name, counts, colour, line in (
        ("true positives", tp, GREEN, "-"),
        ("true negatives", tn, BLUE, "-"),
        ("false positives", fp, ORANGE, "--"),
        ("false negatives", fn, "#b03a48", "--"),
    ):
        below.plot(x, np.asarray(counts), color=colour, linestyle=line, label=name)
    below.axvline(best_threshold, color=ORANGE, linewidth=1)
    below.set(xlabel="threshold (positive: p > threshold)", ylabel="images")
    below.set_ylim(bottom=0)
    below.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=4, fontsize=8.5)
    return figure


@_picture
def plot_challenge_levels(
    names: Sequence[str], mcc: ArrayLike, low: ArrayLike, high: ArrayLike
) -> Figure:
    """MCC of each validator and of its levels [L], by name, with its interval, NaN where there is none."""
    values, bottom, top = (np.asarray(v, dtype=np.float64) for v in (mcc, low, high))
    figure, ax = _figure(max(5.6, 0.85 * len(values)), 4.2)
    x = np.arange(len(values))
    ax.bar(x, values, width=0.6, color=BLUE)
    ax.errorbar(x, values, yerr=[values - bottom, top - values], fmt="none", color="black",
                linewidth=1.2, capsize=4)  # fmt: skip
    for place, value in zip(x, values, strict=True):
        ax.text(place, 0.02, f"{value:.3f}", ha="center", color="white", fontweight="bold")
    ax.set_xticks(x, names)
    ax.set(ylabel="MCC at p > 0.5", title="MCC by validator and level of distortion")
    ax.set_ylim(min(0.0, float(np.nanmin([*values, *bottom]))), 1.0)
    ax.grid(visible=False, axis="x")
    return figure


@_picture
def plot_reward(rewards: ArrayLike, expected: float) -> Figure:
    """Distribution of the reward of one challenge and of a day's mean, of rewards [days, challenges]."""
    paid = np.asarray(rewards, dtype=np.float64)
    figure, ax = _figure(5.6, 4.2)
    edges = np.linspace(0, 1, 41)
    for values, name, colour in ((paid.ravel(), "one challenge", BLUE),
                                 (paid.mean(axis=1), "mean of a day", ORANGE)):  # fmt: skip
        share = np.histogram(values, edges)[0] / len(values)
        ax.stairs(share, edges, fill=True, alpha=0.6, color=colour, label=name)
    ax.axvline(expected, color="black", linewidth=1, label=f"expected, {expected:.3f}")
    ax.set(xlabel="reward", ylabel="share", xlim=(0, 1))
    ax.set_title(f"Reward over {len(paid):,} days of {paid.shape[1]:,} challenges")
    ax.legend(loc="best")
    return figure


@_picture
def plot_replay(
    series: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    min_mcc: float,
    min_accuracy: float,
) -> Figure:
    """MCC over the last 100 and accuracy over the last 10 labelled challenges, with their bounds.

    `series` has, by the name of who answered, rows of the log and both after each of these, [T] each.
    """
    figure, axes = _figure(8.4, 5.6, nrows=2, sharex=True)
    panels = (("MCC over the last 100", min_mcc), ("accuracy over the last 10", min_accuracy))
    for index, (ax, (title, bound)) in enumerate(zip(axes, panels, strict=True), 1):
        for (name, values), colour in zip(series.items(), (BLUE, GREY), strict=False):
            ax.plot(np.asarray(values[0]) + 1, np.asarray(values[index]), color=colour, label=name)
        ax.axhline(bound, color=ORANGE, linestyle="--", linewidth=1, label=f"alarm below {bound:g}")
        ax.set_title(title)
        ax.set_ylim(top=1.03)
    axes[0].legend(loc="lower right", ncols=3)
    axes[1].set_xlabel("challenge in the log")
    return figure


@_picture
def plot_fusion(modes: Mapping[str, Mapping[str, float]], chosen: str, condition: str) -> Figure:
    """Log loss and MCC on VAL_SELECT of each fusion mode, with its views; the chosen one stands out.

    `condition`, `clean` or `served`, says which images the numbers are of.
    """
    figure, axes = _figure(8.4, 0.9 + 0.42 * max(len(modes), 3), ncols=2, sharey=True)
    y = np.arange(len(modes))
    colours = [ORANGE if mode == chosen else BLUE for mode in modes]
    panels = (("log_loss", "log loss"), ("mcc", "MCC at p > 0.5"))
    for ax, (key, title) in zip(axes, panels, strict=True):
        values = [row[key] for row in modes.values()]
        ax.barh(y, values, color=colours, height=0.65)
        for place, value in zip(y, values, strict=True):
            ax.text(max(value, 0.0), place, f" {value:.3f}", va="center", fontsize=9)
        ax.set_xlim(min(0.0, *values), 1.15 * max(*values, 1e-3))
        ax.set_title(title)
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(y, [f"{mode} ({row['views']:g})" for mode, row in modes.items()])
    axes[0].invert_yaxis()
    figure.supxlabel(f"VAL_SELECT, {condition}; the number of views behind each mode", fontsize=9)
    return figure


def _figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    return figure, figure.subplots(**subplots)
