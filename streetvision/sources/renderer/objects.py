"""Drawing primitives of the synthetic street: every object in metres, standing on the ground.

An object is drawn by a function of a `Brush` (where, how large, in which light) and of `Draws` (its
own small variations). Local x points right from the object's middle, y up from the ground.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

Colour = tuple[float, float, float]  # RGB, 0..255
Point = tuple[float, float]
T = TypeVar("T")

WHITE: Colour = (238.0, 238.0, 232.0)
DARK: Colour = (34.0, 34.0, 38.0)
GREY: Colour = (120.0, 122.0, 126.0)
AMBER: Colour = (255.0, 182.0, 46.0)
RUBBER: Colour = (26.0, 26.0, 28.0)
GLASS: Colour = (58.0, 72.0, 86.0)
TROUSERS: tuple[Colour, ...] = ((40, 44, 70), (30, 30, 32), (92, 84, 70), (70, 74, 80))
SKIN: tuple[Colour, ...] = ((224, 178, 148), (168, 118, 86), (96, 64, 46))


class Draws:
    """Cheap scalar draws from one generator, which is asked for a block at a time.

    Built on the raw words of PCG64, the part of NumPy's random streams that never changes.
    """

    def __init__(self, entropy: Sequence[int]) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))
        self._block: list[float] = []

    def bytes(self, count: int) -> NDArray[np.uint8]:
        """Uniform bytes [count]."""
        words = self._bits.random_raw(count // 8 + 1).astype("<u8")
        return words.view(np.uint8)[:count]

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        if not self._block:
            words = self._bits.random_raw(512) >> np.uint64(11)
            self._block = (words * 2.0**-53).tolist()
        return self._block.pop()

    def uniform(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self.unit()

    def log_uniform(self, low: float, high: float) -> float:
        """Log-uniform in [low, high)."""
        return low * math.exp(self.unit() * math.log(high / low))

    def integer(self, low: int, high: int) -> int:
        """Uniform integer in [low, high], both included."""
        return low + int(self.unit() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.unit() < probability

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each as likely."""
        return options[int(self.unit() * len(options))]

    def near(self, colour: Colour, spread: float) -> Colour:
        """Vary a colour in brightness and, half as much, in each channel."""
        shift = self.uniform(-spread, spread)
        half = spread / 2
        red, green, blue = colour
        return (
            min(255.0, max(0.0, red + shift + self.uniform(-half, half))),
            min(255.0, max(0.0, green + shift + self.uniform(-half, half))),
            min(255.0, max(0.0, blue + shift + self.uniform(-half, half))),
        )


@dataclass(frozen=True)
class Light:
    """Illumination and haze of a scene."""

    ambient: Colour  # factor of each channel
    headlight: float  # added near the camera; 0 by day
    haze: Colour  # colour that distance fades into
    haze_length_m: float  # distance at which 63 % of an object is haze
    lamps_on: bool

    def factors(self, distance_m: float) -> tuple[Colour, float]:
        """Channel factors at a distance and the share of haze there."""
        beam = self.headlight * min(1.0, (11.0 / max(distance_m, 1.0)) ** 1.3)
        red, green, blue = self.ambient
        haze = 1.0 - math.exp(-distance_m / self.haze_length_m)
        return (red + beam, green + beam, blue + 0.9 * beam), haze

    def shade(self, colour: Colour, distance_m: float) -> tuple[int, int, int]:
        """Colour of a matt surface as the camera sees it."""
        (red, green, blue), haze = self.factors(distance_m)
        keep = 1.0 - haze
        return (
            min(255, int(colour[0] * red * keep + self.haze[0] * haze)),
            min(255, int(colour[1] * green * keep + self.haze[1] * haze)),
            min(255, int(colour[2] * blue * keep + self.haze[2] * haze)),
        )


class Brush:
    """Draws shapes given in an object's own metres onto the canvas."""

    def __init__(
        self,
        canvas: ImageDraw.ImageDraw,
        light: Light,
        foot_px: Point,
        px_per_m: float,
        distance_m: float,
        flip: float,
    ) -> None:
        self._canvas = canvas
        self.light = light
        self._x, self._y = foot_px
        self._sx, self._s = px_per_m * flip, px_per_m
        self._factors, self._haze = light.factors(distance_m)

    def colour(self, colour: Colour, shine: float = 0.0) -> tuple[int, int, int]:
        """Lit colour; `shine` is the least light that a lamp or retroreflector shows."""
        keep, haze = 1.0 - self._haze, self.light.haze
        red, green, blue = self._factors
        return (
            min(255, int(colour[0] * max(red, shine) * keep + haze[0] * self._haze)),
            min(255, int(colour[1] * max(green, shine) * keep + haze[1] * self._haze)),
            min(255, int(colour[2] * max(blue, shine) * keep + haze[2] * self._haze)),
        )

    def box(
        self, x0: float, y0: float, x1: float, y1: float, c: Colour, shine: float = 0.0
    ) -> None:
        """Draw an upright rectangle, at least one pixel wide and high."""
        left, right = sorted((self._x + x0 * self._sx, self._x + x1 * self._sx))
        self._canvas.rectangle(
            (left, self._y - y1 * self._s, right, self._y - y0 * self._s), self.colour(c, shine)
        )

    def shape(self, points: Sequence[Point], c: Colour, shine: float = 0.0) -> None:
        """Draw a filled polygon."""
        x, y, sx, s = self._x, self._y, self._sx, self._s
        self._canvas.polygon(
            [(x + px * sx, y - py * s) for px, py in points], self.colour(c, shine)
        )

    def oval(self, x: float, y: float, rx: float, ry: float, c: Colour, shine: float = 0.0) -> None:
        """Draw a filled ellipse round (x, y) with the two radii."""
        px, py, rx, ry = self._x + x * self._sx, self._y - y * self._s, rx * self._s, ry * self._s
        self._canvas.ellipse((px - rx, py - ry, px + rx, py + ry), self.colour(c, shine))

    def line(self, points: Sequence[Point], width: float, c: Colour, shine: float = 0.0) -> None:
        """Draw a polyline with a width in metres."""
        x, y, sx, s = self._x, self._y, self._sx, self._s
        self._canvas.line(
            [(x + px * sx, y - py * s) for px, py in points],
            self.colour(c, shine),
            max(1, round(width * s)),
        )


def darker(colour: Colour, factor: float) -> Colour:
    """Scale a colour towards black."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


# Work-zone objects ------------------------------------------------------------------------------


def draw_cone(b: Brush, d: Draws, c: Colour) -> None:
    """Traffic cone with one or two white collars."""
    b.box(-0.24, 0.0, 0.24, 0.07, darker(c, 0.6))
    b.shape([(-0.17, 0.07), (0.17, 0.07), (0.04, 0.75), (-0.04, 0.75)], c, 0.6)
    for low, high in ((0.30, 0.44), (0.52, 0.62))[: d.integer(1, 2)]:
        wide, thin = 0.18 - 0.19 * low, 0.18 - 0.19 * high
        b.shape([(-wide, low), (wide, low), (thin, high), (-thin, high)], WHITE, 0.9)


def draw_drum(b: Brush, d: Draws, c: Colour) -> None:
    """Channelising drum, banded in orange and white."""
    b.box(-0.34, 0.0, 0.34, 0.1, RUBBER)
    b.box(-0.27, 0.1, 0.27, 1.0, c, 0.6)
    for low in (0.3, 0.66):
        b.box(-0.27, low, 0.27, low + 0.17, WHITE, 0.9)
    if d.chance(0.3):
        b.oval(0.0, 1.1, 0.1, 0.1, AMBER, 1.0)


def _striped_board(b: Brush, half: float, low: float, high: float, c: Colour) -> None:
    b.box(-half, low, half, high, WHITE, 0.8)
    tilt, step = high - low, 0.42
    for k in range(int(2 * half / step)):
        x = -half + k * step
        b.shape([(x, low), (x + 0.21, low), (x + 0.21 + tilt, high), (x + tilt, high)], c, 0.7)


def draw_barricade(b: Brush, d: Draws, c: Colour) -> None:
    """Barricade of two or three diagonally striped boards."""
    for x in (-0.75, 0.75):
        b.box(x - 0.05, 0.0, x + 0.05, 1.4, (150, 150, 150))
    for low in (1.12, 0.72, 0.32)[: d.integer(2, 3)]:
        _striped_board(b, 0.95, low, low + 0.26, c)
    if d.chance(0.4):
        for x in (-0.75, 0.75):
            b.oval(x, 1.45, 0.1, 0.1, AMBER, 1.0)


def draw_work_sign(b: Brush, d: Draws, c: Colour) -> None:
    """Orange diamond with a dark legend, on a post or a folding stand."""
    middle = 1.75
    b.box(-0.04, 0.0, 0.04, middle, GREY)
    b.line([(-0.4, 0.0), (0.0, 0.7), (0.4, 0.0)], 0.06, GREY)
    for radius, colour in ((0.8, DARK), (0.74, c)):
        b.shape(
            [(0, middle - radius), (radius, middle), (0, middle + radius), (-radius, middle)],
            colour,
            0.8,
        )
    if d.chance(0.5):
        for row, width in ((0.2, 0.3), (0.0, 0.45), (-0.2, 0.3)):
            b.box(-width, middle + row - 0.05, width, middle + row + 0.05, DARK)
    else:
        b.oval(-0.05, middle + 0.32, 0.1, 0.1, DARK)
        b.line([(0.0, middle + 0.2), (-0.15, middle - 0.1), (-0.3, middle - 0.3)], 0.13, DARK)
        b.line([(-0.1, middle + 0.1), (0.2, middle - 0.1), (0.35, middle - 0.25)], 0.09, DARK)
        b.oval(0.32, middle - 0.27, 0.14, 0.1, DARK)


def draw_arrow_board(b: Brush, d: Draws, c: Colour) -> None:
    """Trailer with a dark panel of amber lamps that form an arrow."""
    b.box(-0.8, 0.3, 0.8, 0.5, c)
    for x in (-0.6, 0.6):
        b.oval(x, 0.25, 0.25, 0.25, RUBBER)
    b.box(-0.06, 0.5, 0.06, 1.3, GREY)
    b.box(-1.2, 1.2, 1.2, 2.5, darker(c, 0.9))
    b.box(-1.12, 1.27, 1.12, 2.43, (20, 20, 22))
    lamps = [(-0.85 + 0.3 * k, 1.85) for k in range(7)]
    lamps += [(0.7, 2.05), (0.7, 1.65), (0.45, 2.25), (0.45, 1.45)]
    for x, y in lamps:
        b.oval(x, y, 0.13, 0.13, AMBER, 1.0)


def draw_excavator(b: Brush, d: Draws, c: Colour) -> None:
    """Excavator from the side: tracks, house, cab, boom, stick and bucket."""
    b.box(-2.0, 0.0, 0.7, 0.7, RUBBER)
    b.box(-1.7, 0.2, 0.4, 0.5, (70, 66, 60))
    b.box(-2.1, 0.85, 0.3, 1.75, c)
    b.box(-2.1, 0.85, -1.4, 1.6, darker(c, 0.75))
    b.box(-0.6, 1.0, 0.5, 2.7, c)
    b.box(-0.45, 1.7, 0.4, 2.55, GLASS)
    elbow = (d.uniform(1.3, 1.7), d.uniform(2.9, 3.3))
    wrist = (2.5, d.uniform(0.9, 1.5))
    b.line([(0.5, 1.3), elbow], 0.36, c)
    b.line([elbow, wrist], 0.26, darker(c, 0.88))
    x, y = wrist
    b.shape([(x - 0.5, y), (x + 0.2, y + 0.1), (x + 0.1, y - 0.7), (x - 0.6, y - 0.6)], DARK)


def _person(b: Brush, d: Draws, coat: Colour) -> None:
    stride = d.uniform(0.05, 0.24)
    trousers = d.pick(TROUSERS)
    b.line([(-stride, 0.0), (0.0, 0.85)], 0.17, trousers)
    b.line([(stride, 0.0), (0.0, 0.85)], 0.17, darker(trousers, 0.8))
    b.box(-0.23, 0.78, 0.23, 1.45, coat, 0.3)
    b.line([(0.24, 1.38), (0.3, 0.85)], 0.11, darker(coat, 0.85))
    b.oval(0.0, 1.6, 0.12, 0.15, d.pick(SKIN))


def _vest_bands(b: Brush) -> None:
    b.box(-0.23, 0.95, 0.23, 1.02, WHITE, 0.9)
    b.box(-0.23, 1.15, 0.23, 1.22, WHITE, 0.9)


def draw_worker(b: Brush, d: Draws, c: Colour) -> None:
    """Worker: high-visibility vest, helmet, often a shovel."""
    _person(b, d, c)
    _vest_bands(b)
    b.box(-0.15, 1.66, 0.15, 1.8, d.pick(((250, 210, 40), WHITE, (250, 130, 30))))
    if d.chance(0.6):
        b.line([(0.3, 1.1), (0.55, 0.1)], 0.05, (120, 90, 60))
        b.box(0.47, 0.0, 0.65, 0.22, GREY)


def draw_mesh_fence(b: Brush, d: Draws, c: Colour) -> None:
    """Orange safety netting between posts."""
    b.box(-2.2, 0.12, 2.2, 1.05, c, 0.3)
    hole = darker(c, 0.55)
    for row in (0.3, 0.52, 0.74, 0.92):
        b.line([(-2.2, row), (2.2, row)], 0.05, hole)
    for k in range(1, 15):
        b.line([(-2.2 + 0.3 * k, 0.12), (-2.2 + 0.3 * k, 1.05)], 0.05, hole)
    for k in range(4):
        x = -2.2 + k * 4.4 / 3
        b.box(x - 0.05, 0.0, x + 0.05, 1.2, (90, 80, 70))


def draw_water_barrier(b: Brush, d: Draws, c: Colour) -> None:
    """Interlocked plastic barriers, orange and white by turns."""
    for k in range(4):
        x = -2.2 + 1.1 * k
        b.shape(
            [(x, 0.0), (x + 1.08, 0.0), (x + 0.95, 0.9), (x + 0.13, 0.9)],
            c if k % 2 else WHITE,
            0.3,
        )
        b.box(x + 0.3, 0.12, x + 0.8, 0.26, DARK)


# Everyday objects -------------------------------------------------------------------------------


def draw_car(b: Brush, d: Draws, c: Colour) -> None:
    """Car from behind, or from the front with white lamps."""
    rear = d.chance(0.7)
    for x in (-0.68, 0.68):
        b.box(x - 0.14, 0.0, x + 0.14, 0.4, RUBBER)
    b.box(-0.88, 0.25, 0.88, 0.92, c)
    b.shape([(-0.8, 0.9), (0.8, 0.9), (0.6, 1.45), (-0.6, 1.45)], c)
    b.shape([(-0.68, 0.93), (0.68, 0.93), (0.53, 1.36), (-0.53, 1.36)], GLASS)
    b.box(-0.88, 0.25, 0.88, 0.42, darker(c, 0.6))
    lamp: Colour = (215, 30, 28) if rear else (255, 250, 225)
    for x in (-0.74, 0.74):
        b.box(x - 0.13, 0.62, x + 0.13, 0.78, lamp, 1.0 if b.light.lamps_on else 0.0)
    b.box(-0.24, 0.46, 0.24, 0.58, WHITE)


def draw_car_side(b: Brush, d: Draws, c: Colour) -> None:
    """Car from the side, crossing or parked across."""
    b.shape([(-1.1, 0.85), (1.2, 0.85), (0.75, 1.42), (-0.7, 1.42)], c)
    b.shape([(-0.95, 0.88), (0.0, 0.88), (0.0, 1.34), (-0.63, 1.34)], GLASS)
    b.shape([(0.08, 0.88), (1.02, 0.88), (0.68, 1.34), (0.08, 1.34)], GLASS)
    b.box(-2.1, 0.28, 2.1, 0.88, c)
    b.box(-2.1, 0.28, 2.1, 0.4, darker(c, 0.6))
    for x in (-1.3, 1.3):
        b.oval(x, 0.32, 0.33, 0.33, RUBBER)
        b.oval(x, 0.32, 0.16, 0.16, GREY)
    b.box(-2.1, 0.62, -1.95, 0.78, (215, 30, 28), 0.8)


def draw_truck(b: Brush, d: Draws, c: Colour) -> None:
    """Box truck from behind."""
    for x in (-0.9, 0.9):
        b.box(x - 0.2, 0.0, x + 0.2, 0.7, RUBBER)
    b.box(-1.2, 0.6, 1.2, 3.1, c)
    b.box(-1.1, 0.75, 1.1, 3.0, darker(c, 0.9))
    b.box(-0.02, 0.75, 0.02, 3.0, darker(c, 0.6))
    b.box(-1.2, 0.5, 1.2, 0.66, DARK)
    for x in (-1.0, 1.0):
        b.box(x - 0.14, 0.52, x + 0.14, 0.64, (215, 30, 28), 0.8)


def draw_lorry_side(b: Brush, d: Draws, c: Colour) -> None:
    """Parked lorry from the side: cab, box, three wheels."""
    b.box(-2.6, 0.8, 1.1, 2.9, c)
    b.box(-2.6, 0.6, 2.4, 0.85, DARK)
    cab = d.pick((c, WHITE, darker(c, 0.8)))
    b.shape([(1.2, 0.6), (2.4, 0.6), (2.4, 1.5), (2.1, 2.4), (1.2, 2.4)], cab)
    b.shape([(1.55, 1.45), (2.3, 1.45), (2.05, 2.2), (1.55, 2.2)], GLASS)
    for x in (-1.9, -1.1, 1.75):
        b.oval(x, 0.42, 0.42, 0.42, RUBBER)


def draw_bus(b: Brush, d: Draws, c: Colour) -> None:
    """Bus from behind with a wide rear window."""
    for x in (-0.9, 0.9):
        b.box(x - 0.2, 0.0, x + 0.2, 0.5, RUBBER)
    b.box(-1.25, 0.35, 1.25, 3.0, c)
    b.box(-1.05, 1.6, 1.05, 2.5, GLASS)
    b.box(-0.7, 2.62, 0.7, 2.88, DARK)
    b.box(-0.5, 2.68, 0.4, 2.82, AMBER, 0.9)
    for x in (-1.05, 1.05):
        b.box(x - 0.12, 0.8, x + 0.12, 1.15, (215, 30, 28), 0.8)


def draw_pedestrian(b: Brush, d: Draws, c: Colour) -> None:
    """Pedestrian in everyday clothes."""
    _person(b, d, c)
    b.box(-0.13, 1.64, 0.13, 1.76, d.pick(((40, 30, 24), (110, 84, 50), (60, 60, 66))))


def draw_hivis(b: Brush, d: Draws, c: Colour) -> None:
    """Pedestrian in a high-visibility vest, bare-headed: no roadwork."""
    _person(b, d, c)
    _vest_bands(b)
    b.box(-0.13, 1.66, 0.13, 1.75, (50, 38, 30))


def draw_bin(b: Brush, d: Draws, c: Colour) -> None:
    """Wheeled bin with a dark lid."""
    b.shape([(-0.24, 0.08), (0.24, 0.08), (0.3, 0.95), (-0.3, 0.95)], c)
    b.box(-0.33, 0.93, 0.33, 1.05, darker(c, d.pick((0.35, 0.75))))
    b.oval(-0.2, 0.09, 0.1, 0.1, RUBBER)
    b.box(-0.12, 0.45, 0.12, 0.65, d.pick((WHITE, darker(c, 0.7), (90, 140, 80))))


def draw_planter(b: Brush, d: Draws, c: Colour) -> None:
    """Terracotta pot with a shrub."""
    b.shape([(-0.22, 0.0), (0.22, 0.0), (0.34, 0.5), (-0.34, 0.5)], c)
    b.box(-0.37, 0.45, 0.37, 0.55, darker(c, 0.85))
    b.oval(0.0, 0.82, 0.4, 0.34, d.near((70, 110, 55), 18))


def draw_yellow_sign(b: Brush, d: Draws, c: Colour) -> None:
    """Ordinary warning sign: yellow diamond on a tall post."""
    middle = 2.2
    b.box(-0.04, 0.0, 0.04, middle, GREY)
    yellow = d.near((246, 204, 28), 12)
    for radius, colour in ((0.62, DARK), (0.56, yellow)):
        b.shape(
            [(0, middle - radius), (radius, middle), (0, middle + radius), (-radius, middle)],
            colour,
            0.8,
        )
    if d.chance(0.5):
        b.line([(0, middle - 0.3), (0, middle), (0.2, middle + 0.24)], 0.1, DARK)
    else:
        b.oval(0, middle + 0.2, 0.08, 0.08, DARK)
        b.line([(0, middle + 0.1), (0, middle - 0.1), (0.14, middle - 0.3)], 0.1, DARK)


def draw_round_sign(b: Brush, d: Draws, c: Colour) -> None:
    """Speed limit or no-entry disc."""
    b.box(-0.04, 0.0, 0.04, 2.1, GREY)
    b.oval(0.0, 2.3, 0.42, 0.42, (200, 34, 36), 0.8)
    if d.chance(0.5):
        b.oval(0.0, 2.3, 0.3, 0.3, WHITE, 0.8)
        b.box(-0.16, 2.18, 0.16, 2.42, DARK)
    else:
        b.box(-0.28, 2.22, 0.28, 2.36, WHITE, 0.8)


def draw_panel_sign(b: Brush, d: Draws, c: Colour) -> None:
    """Rectangular shop or direction panel with lines of lettering."""
    b.box(-0.04, 0.0, 0.04, 1.5, GREY)
    b.box(-0.6, 1.4, 0.6, 2.5, c, 0.5)
    ink = d.pick((WHITE, DARK))
    for row in (2.2, 1.95, 1.7):
        b.box(-0.45, row - 0.05, d.uniform(0.0, 0.45), row + 0.05, ink)


def draw_billboard(b: Brush, d: Draws, c: Colour) -> None:
    """Advertisement with a coloured field and a blob."""
    for x in (-1.2, 1.2):
        b.box(x - 0.07, 0.0, x + 0.07, 1.2, GREY)
    b.box(-1.9, 1.1, 1.9, 2.9, WHITE)
    b.box(-1.8, 1.2, 1.8, 2.8, c, 0.4)
    other = d.pick((WHITE, (60, 90, 160), DARK, (240, 220, 90)))
    b.oval(-0.9, 2.0, 0.55, 0.55, other)
    for row in (2.4, 2.05, 1.7):
        b.box(0.0, row - 0.08, d.uniform(0.6, 1.6), row + 0.08, other)


def draw_stall(b: Brush, d: Draws, c: Colour) -> None:
    """Market stall under a striped awning: stripes that are no barricade."""
    for x in (-1.15, 1.15):
        b.box(x - 0.04, 0.0, x + 0.04, 2.0, (110, 100, 90))
    b.box(-1.1, 0.0, 1.1, 0.8, d.pick(((130, 96, 62), (170, 160, 150), (90, 110, 90))))
    for k in range(8):
        x = -1.3 + k * 0.325
        b.shape(
            [(x, 1.75), (x + 0.325, 1.75), (0.75 * (x + 0.325), 2.4), (0.75 * x, 2.4)],
            c if k % 2 else WHITE,
        )


def draw_display(b: Brush, d: Draws, c: Colour) -> None:
    """Bus-stop display: dark panel with lines of amber, green or white letters."""
    b.box(-0.06, 0.0, 0.06, 1.4, GREY)
    b.box(-1.1, 1.35, 1.1, 2.35, darker(c, 0.9))
    b.box(-1.02, 1.42, 1.02, 2.28, (20, 20, 22))
    ink = d.pick((AMBER, AMBER, (120, 235, 130), WHITE))
    for row in (2.1, 1.85, 1.6):
        x = -0.9
        while x < 0.7:
            width = d.uniform(0.1, 0.34)
            b.box(x, row - 0.07, x + width, row + 0.07, ink, 1.0)
            x += width + 0.1


def draw_plank_fence(b: Brush, d: Draws, c: Colour) -> None:
    """Garden fence of upright planks."""
    plank = (c[0] * 0.82, c[1] * 0.9, c[2] * 1.1)
    for k in range(14):
        x = -2.2 + k * 0.32
        b.box(x, 0.08, x + 0.24, 1.15, plank if k % 2 else darker(plank, 0.9))
    b.box(-2.2, 0.8, 2.25, 0.9, darker(plank, 0.7))


def draw_flower_bed(b: Brush, d: Draws, c: Colour) -> None:
    """Hedge with blossoms."""
    b.box(-2.0, 0.0, 2.0, 0.75, d.near((62, 100, 50), 14))
    for k in range(12):
        b.oval(-1.9 + k * 0.34, 0.8, 0.24, 0.2, (70, 108, 56))
    for _ in range(16):
        b.oval(d.uniform(-1.9, 1.9), d.uniform(0.2, 0.9), 0.15, 0.13, c)


def draw_scooter(b: Brush, d: Draws, c: Colour) -> None:
    """Rental bicycle with a coloured frame."""
    for x in (-0.55, 0.55):
        b.oval(x, 0.34, 0.34, 0.34, RUBBER)
        b.oval(x, 0.34, 0.24, 0.24, (130, 130, 128))
    b.line([(-0.55, 0.34), (-0.1, 0.85), (0.45, 0.85), (0.0, 0.3), (-0.55, 0.34)], 0.12, c)
    b.line([(0.55, 0.34), (0.4, 1.05)], 0.1, c)
    b.box(0.3, 0.98, 0.6, 1.08, DARK)
    b.box(-0.3, 0.9, 0.05, 0.98, DARK)
    b.box(-0.95, 0.6, -0.45, 0.9, c)


def draw_tree(b: Brush, d: Draws, c: Colour) -> None:
    """Broad-leaved tree; `c` is the colour of its crown."""
    b.box(-0.14, 0.0, 0.14, 2.6, (84, 66, 50))
    for _ in range(6):
        tint = darker(c, d.uniform(0.8, 1.15))
        b.oval(d.uniform(-0.9, 0.9), d.uniform(2.8, 4.6), d.uniform(0.8, 1.3), 0.95, tint)


def draw_conifer(b: Brush, d: Draws, c: Colour) -> None:
    """Conifer in three tiers."""
    b.box(-0.13, 0.0, 0.13, 1.2, (74, 58, 46))
    for low, half in ((1.0, 1.4), (2.2, 1.1), (3.4, 0.75)):
        b.shape([(-half, low), (half, low), (0.0, low + 2.0)], darker(c, 0.7 + 0.06 * low))


def draw_palm(b: Brush, d: Draws, c: Colour) -> None:
    """Palm with drooping fronds."""
    b.line([(0.0, 0.0), (0.15, 2.5), (0.1, 4.6)], 0.24, (126, 104, 78))
    for x, y in ((-1.5, 4.3), (1.6, 4.4), (-1.1, 5.3), (1.2, 5.4), (-0.4, 3.8), (0.7, 3.9)):
        b.line([(0.1, 4.7), (x * 0.6, (4.7 + y) / 2 + 0.35), (x, y)], 0.3, c)


def draw_lamp(b: Brush, d: Draws, c: Colour) -> None:
    """Street lamp on an arm over the road."""
    b.box(-0.07, 0.0, 0.07, 6.0, c)
    b.line([(0.0, 6.0), (1.2, 6.3)], 0.1, c)
    b.box(0.9, 6.2, 1.5, 6.38, (255, 232, 180), 1.0 if b.light.lamps_on else 0.0)


def draw_traffic_light(b: Brush, d: Draws, c: Colour) -> None:
    """Signal head on a post."""
    b.box(-0.06, 0.0, 0.06, 2.4, GREY)
    b.box(-0.2, 2.3, 0.2, 3.3, (28, 28, 30))
    lit = d.integer(0, 2)
    lamps: tuple[Colour, ...] = ((60, 220, 120), AMBER, (235, 40, 36))
    for k, lamp in enumerate(lamps):
        b.oval(0.0, 2.5 + 0.3 * k, 0.12, 0.12, lamp if k == lit else darker(lamp, 0.25), 1.0)


@dataclass(frozen=True)
class Kind:
    """How an object is drawn and the space it takes."""

    draw: Callable[[Brush, Draws, Colour], None]
    half_width_m: float
    height_m: float


KINDS: dict[str, Kind] = {
    "cone": Kind(draw_cone, 0.24, 0.75),
    "drum": Kind(draw_drum, 0.34, 1.2),
    "barricade": Kind(draw_barricade, 0.95, 1.55),
    "work_sign": Kind(draw_work_sign, 0.8, 2.55),
    "arrow_board": Kind(draw_arrow_board, 1.2, 2.5),
    "excavator": Kind(draw_excavator, 2.75, 3.4),
    "worker": Kind(draw_worker, 0.65, 1.8),
    "mesh_fence": Kind(draw_mesh_fence, 2.25, 1.2),
    "water_barrier": Kind(draw_water_barrier, 2.2, 0.9),
    "car": Kind(draw_car, 0.88, 1.45),
    "car_side": Kind(draw_car_side, 2.1, 1.42),
    "truck": Kind(draw_truck, 1.2, 3.1),
    "lorry_side": Kind(draw_lorry_side, 2.6, 2.9),
    "bus": Kind(draw_bus, 1.25, 3.0),
    "pedestrian": Kind(draw_pedestrian, 0.32, 1.76),
    "hivis": Kind(draw_hivis, 0.32, 1.76),
    "bin": Kind(draw_bin, 0.33, 1.05),
    "planter": Kind(draw_planter, 0.4, 1.15),
    "yellow_sign": Kind(draw_yellow_sign, 0.62, 2.82),
    "round_sign": Kind(draw_round_sign, 0.42, 2.72),
    "panel_sign": Kind(draw_panel_sign, 0.6, 2.5),
    "billboard": Kind(draw_billboard, 1.9, 2.9),
    "stall": Kind(draw_stall, 1.3, 2.4),
    "display": Kind(draw_display, 1.1, 2.35),
    "plank_fence": Kind(draw_plank_fence, 2.25, 1.15),
    "flower_bed": Kind(draw_flower_bed, 2.1, 1.0),
    "scooter": Kind(draw_scooter, 0.95, 1.08),
    "tree": Kind(draw_tree, 2.0, 5.5),
    "conifer": Kind(draw_conifer, 1.4, 5.4),
    "palm": Kind(draw_palm, 1.6, 5.6),
    "lamp": Kind(draw_lamp, 0.3, 6.4),
    "traffic_light": Kind(draw_traffic_light, 0.2, 3.3),
}
WORK_KINDS = frozenset(list(KINDS)[:9])  # their presence makes a scene positive
