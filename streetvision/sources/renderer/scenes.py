"""Procedural dash-cam scenes, with and without roadwork: a data set that needs no download.

Every scene is a pure function of (seed, index, arguments). Positives hold a work zone; most
negatives hold a decoy of the same size, place and colours in its stead (orange cars and bins,
people in vests, yellow diamonds, striped awnings), and everyday street life fills both alike, so
neither colour nor the presence of a distractor tells the classes apart.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from streetvision.core.errors import UserError
from streetvision.sources.renderer.layout import Box, Composer, Item, clip
from streetvision.sources.renderer.objects import KINDS, Brush, Colour, Draws, darker
from streetvision.sources.renderer.street import (
    SCENE_STREAM,
    Camera,
    Drive,
    Street,
    city_style,
    drive_style,
)

MAX_CITIES, MAX_DRIVES_PER_CITY = 1500, 64  # what the grids of positions hold
SUPERSAMPLING = 2  # the canvas is this many times the image, then averaged down


@dataclass(frozen=True)
class Scene:
    """One rendered frame and its ground truth."""

    image: Image.Image  # RGB
    label: int  # 1 = roadwork
    city: str
    drive: str  # unique over all cities
    latitude: float  # degrees
    longitude: float  # degrees
    weather: str  # clear, cloudy, rain, fog
    daytime: str  # day, dusk, night
    scene: str  # urban, residential, highway, rural
    scene_description: str  # of the roadwork; "" for a negative
    evidence_box: Box | None  # x0, y0, x1, y1 in [0, 1]; None for a negative


_SLENDER = ("tree", "conifer", "palm", "lamp", "work_sign", "yellow_sign", "panel_sign")  # shadows


def _paint(street: Street, items: list[Item]) -> None:
    """Draw the objects from far to near, each on its shadow."""
    camera, light, canvas = street.camera, street.drive.light, street.canvas
    shadow = darker(street.style.asphalt, 0.55)
    for item in sorted(items, key=lambda item: -item.z):
        left, _, right, _ = item.box(camera)
        if right < 0 or left > camera.width:
            continue
        x, y = camera.project(item.x, 0.0, item.z)
        scale = camera.focal / item.z * item.size
        kind = KINDS[item.kind]
        wide = (0.35 if item.kind in _SLENDER else 1.1) * kind.half_width_m * scale
        flat = 0.16 * wide
        canvas.ellipse((x - wide, y - flat, x + wide, y + flat), light.shade(shadow, item.z))
        brush = Brush(canvas, light, (x, y), scale, item.z, item.flip)
        kind.draw(brush, street.d, item.colour)


def _tone_table(balance: Colour, contrast: float) -> list[int]:
    """Look-up table of the camera: white balance and contrast of each channel."""
    levels = (128 + (np.arange(256) - 128) * contrast) * np.array(balance)[:, None]
    table: list[int] = np.clip(np.rint(levels), 0, 255).astype(np.int64).ravel().tolist()
    return table


def _glow(pixels: NDArray[np.int16], x: float, y: float, radius: float, colour: Colour) -> None:
    """Add a soft halo in place."""
    height, width, _ = pixels.shape
    x0, x1 = max(0, int(x - radius)), min(width, int(x + radius) + 1)
    y0, y1 = max(0, int(y - radius)), min(height, int(y + radius) + 1)
    if x0 >= x1 or y0 >= y1:
        return
    across = (np.arange(x0, x1) - x) / radius
    down = (np.arange(y0, y1) - y) / radius
    fall = np.maximum(0.0, 1.0 - across[None, :] ** 2 - down[:, None] ** 2) ** 2
    pixels[y0:y1, x0:x1] += (fall[..., None] * np.asarray(colour)).astype(np.int16)


def _develop(street: Street, items: list[Item]) -> Image.Image:
    """Turn the canvas into the camera's image: weather, bonnet, lens, halos, tone and noise."""
    camera, drive, d = street.camera, street.drive, street.d
    canvas = street.canvas
    if drive.weather == "rain":
        streak = tuple(int(0.6 * c + 70) for c in drive.sky[1])
        for _ in range(70):
            x, y = d.uniform(0, camera.width), d.uniform(0, camera.height)
            long = camera.height * d.uniform(0.015, 0.05)
            canvas.line((x, y, x - 0.25 * long, y + long), streak, 1)
    if drive.hood:
        top = camera.height * (1.0 - drive.hood)
        canvas.ellipse(
            (-0.2 * camera.width, top, 1.2 * camera.width, camera.height * 1.4),
            drive.light.shade((46, 48, 54), 3.0),
        )
    image = street.image.reduce(SUPERSAMPLING).filter(ImageFilter.BoxBlur(0.35))
    image = image.point(_tone_table(drive.balance, drive.contrast))
    pixels = np.asarray(image).astype(np.int16)
    if drive.light.lamps_on:
        for item in items:
            if item.kind == "lamp":
                x, y = camera.project(item.x + 1.2 * item.flip, 6.3, item.z)
                radius = max(3.0, 0.9 * camera.focal / item.z / SUPERSAMPLING)
                _glow(pixels, x / SUPERSAMPLING, y / SUPERSAMPLING, radius, (110, 92, 60))
    # The sum of two uniform bytes is near enough to Gaussian noise; its deviation is 104.5.
    grain = d.bytes(2 * pixels.size).reshape(2, *pixels.shape).astype(np.int16)
    noise = ((grain[0] + grain[1] - 255) * round(drive.noise / 104.5 * 256)) >> 8
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


_NAMES = {
    "cone": ("traffic cone", "traffic cones"),
    "drum": ("drum", "drums"),
    "barricade": ("striped barricade", "striped barricades"),
    "work_sign": ("orange work sign", "orange work signs"),
    "arrow_board": ("arrow board", "arrow boards"),
    "excavator": ("excavator", "excavators"),
    "worker": ("worker", "workers"),
    "mesh_fence": ("length of mesh fence", "lengths of mesh fence"),
    "water_barrier": ("plastic barrier", "plastic barriers"),
}


def _describe(zone: list[Item], drive: Drive) -> str:
    kinds = [item.kind for item in zone]
    parts = [
        f"{kinds.count(kind)} {_NAMES[kind][kinds.count(kind) > 1]}"
        for kind in dict.fromkeys(kinds)
    ]
    side = "left" if zone[0].x < -1.0 else "right" if zone[0].x > 1.0 else "middle"
    return (
        f"Roadwork with {', '.join(parts)} on the {side} of a {drive.scene} street, about "
        f"{round(zone[0].z)} m ahead, {drive.weather} weather, {drive.daytime}."
    )


def _evidence(zone: list[Item], camera: Camera, frame: Box) -> Box:
    """Box round the zone, clipped to what the bonnet leaves free, relative to the image."""
    lefts, tops, rights, bottoms = zip(*(item.box(camera) for item in zone), strict=True)
    left, top, right, bottom = clip((min(lefts), min(tops), max(rights), max(bottoms)), frame)
    return left / camera.width, top / camera.height, right / camera.width, bottom / camera.height


def render_scene(
    seed: int,
    index: int,
    *,
    cities: int = 60,
    drives_per_city: int = 4,
    positive_share: float = 0.6,
    width_px: int = 256,
    height_px: int = 192,
) -> Scene:
    """Render one scene.

    Consecutive indices run through the cities, then through the drives of each, so that every
    `cities * drives_per_city` indices hold each drive once.

    Raises
    ------
    UserError
        An argument is out of its range.
    """
    _check(seed, index, cities, drives_per_city, positive_share, width_px, height_px)
    city, number = index % cities, index // cities % drives_per_city
    style, drive = city_style(seed, city), drive_style(seed, city, number)
    d = Draws((seed, SCENE_STREAM, index))
    label = int(d.chance(positive_share))
    width, height = width_px * SUPERSAMPLING, height_px * SUPERSAMPLING
    camera = Camera(
        focal=drive.focal * width,
        centre_x=(drive.centre + d.uniform(-0.06, 0.06)) * width,
        horizon_y=(drive.horizon + d.uniform(-0.015, 0.015)) * height,
        height_m=drive.camera_m,
        width=width,
        height=height,
    )
    street = Street(style, drive, camera, d)
    street.draw()
    composer = Composer(style, drive, camera, d)
    focus = composer.focus(label)
    items = composer.admit(composer.occluder(focus) + composer.street_life(), focus) + focus
    _paint(street, items)
    metres = d.uniform(-400, 400)
    return Scene(
        image=_develop(street, items),
        label=label,
        city=f"city{city:03d}",
        drive=f"city{city:03d}-drive{number}",
        latitude=drive.latitude + metres * drive.heading[0],
        longitude=drive.longitude + metres * drive.heading[1],
        weather=drive.weather,
        daytime=drive.daytime,
        scene=drive.scene,
        scene_description=_describe(focus, drive) if label else "",
        evidence_box=_evidence(focus, camera, composer.frame) if label else None,
    )


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode as JPEG; `quality` 1 to 95."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _check(
    seed: int,
    index: int,
    cities: int,
    drives_per_city: int,
    positive_share: float,
    width_px: int,
    height_px: int,
) -> None:
    ranges = (
        ("seed", seed, 0, math.inf),
        ("index", index, 0, math.inf),
        ("cities", cities, 1, MAX_CITIES),
        ("drives_per_city", drives_per_city, 1, MAX_DRIVES_PER_CITY),
        ("positive_share", positive_share, 0.0, 1.0),
        ("width_px", width_px, 64, 2048),
        ("height_px", height_px, 64, 2048),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise UserError(f"render_scene: {name} {value} is outside {low} to {high}")
