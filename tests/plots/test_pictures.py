from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from streetvision.core.errors import UserError
from streetvision.plots import pictures as plots
from streetvision.review import review_plots

RNG = np.random.default_rng(0)
Y = np.arange(200) % 4 // 3
P = np.clip(0.3 + 0.4 * Y + RNG.normal(0, 0.2, 200), 0, 1)
MODEL = {"model": P}
PICTURES = [RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(5)]
GRID = np.linspace(0, 1, 11)
MODES = {
    "single": {"log_loss": 0.3, "mcc": 0.5, "views": 1},
    "mlp": {"log_loss": 0.2, "mcc": 0.6, "views": 10},
    "latent": {"log_loss": 0.4, "mcc": -0.1, "views": 10},
}

CASES = {
    "roc": (lambda: review_plots.overlay_roc(Y, MODEL), (5.2, 5.0)),
    "precision_recall": (
        lambda: review_plots.overlay_precision_recall(Y, MODEL, 0.5),
        (5.2, 5.0),
    ),
    "confusion": (lambda: plots.plot_confusion(tp=5, fp=1, tn=9, fn=0), (4.8, 4.4)),
    "reliability": (lambda: review_plots.overlay_reliability(Y, MODEL, 0.5), (5.2, 6.2)),
    "reliability_of_two": (
        lambda: review_plots.overlay_reliability(Y, MODEL | {"other": P**2}, 0.5),
        (5.2, 6.2),
    ),
    "mistakes": (
        lambda: plots.plot_mistakes([*PICTURES, Image.new("L", (9, 9))], list("abcdef")),
        (8.8, 5.5),
    ),
    "no_mistakes": (lambda: plots.plot_mistakes([], []), (5.0, 1.2)),
    "sweep": (
        lambda: plots.plot_threshold_sweep(GRID, GRID, GRID, GRID, GRID, GRID, 0.4),
        (6.4, 6.2),
    ),
    "fusion": (lambda: plots.plot_fusion(MODES, "mlp", "clean"), (8.4, 0.9 + 0.42 * 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_deterministic_and_of_their_size(name):
    draw, (width, height) = CASES[name]
    first = draw()
    with mpl.rc_context({"font.size": 30, "figure.dpi": 50, "savefig.bbox": "tight"}):
        assert draw() == first  # whatever the user has configured
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.format == "PNG"
        assert picture.size == pytest.approx((width * plots.DPI, height * plots.DPI), abs=1)
        assert "Software" not in picture.info
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10  # something was drawn


def test_drawing_leaves_the_configuration_alone():
    before = dict(mpl.rcParams)
    review_plots.overlay_roc(Y, MODEL)
    assert dict(mpl.rcParams) == before


def test_pictures_depend_on_the_data():
    draw = review_plots.overlay_roc
    assert len({draw(Y, MODEL), draw(Y, {"model": 1 - P}), draw(Y, MODEL | {"other": P**2})}) == 3
    reliability = review_plots.overlay_reliability
    assert reliability(Y, MODEL, 0.5) != reliability(Y, MODEL, 0.3)
    pictures = {
        plots.plot_fusion(MODES, mode, condition)
        for mode in ("mlp", "single")
        for condition in ("clean", "served")
    }
    assert len(pictures) == 4


def test_confusion_of_one_class_is_drawn():
    assert plots.plot_confusion(tp=3, fp=0, tn=0, fn=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.plot_mistakes(PICTURES, ["one"]), "5 images but 1 captions"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
