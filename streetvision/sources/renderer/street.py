"""Cities, drives and the empty street of the synthetic scenes.

World: X metres to the right of the camera's lane, Z metres ahead, Y metres above the road.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from PIL import Image, ImageDraw

from streetvision.sources.renderer.objects import WHITE, Colour, Draws, Light, darker

CITY_STREAM, DRIVE_STREAM, SCENE_STREAM = range(3)
LANE_M = 3.3
FAR_M = 140.0


class Camera(NamedTuple):
    """Pinhole camera on the dashboard; all in pixels of the canvas but `height_m`."""

    focal: float
    centre_x: float
    horizon_y: float
    height_m: float
    width: int
    height: int

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Canvas position of a point in the world."""
        scale = self.focal / z
        return self.centre_x + x * scale, self.horizon_y + (self.height_m - y) * scale


@dataclass(frozen=True)
class CityStyle:
    """What all streets of a city have in common."""

    latitude: float
    longitude: float
    walls: tuple[Colour, ...]
    window: Colour
    window_share: tuple[float, float]  # of a bay's width and of a floor's height
    floor_m: float
    floors: tuple[int, int]
    frontage_m: tuple[float, float]
    gabled: float  # probability of a gabled roof
    roof: Colour
    asphalt: Colour
    pavement: Colour
    verge: Colour
    centre_line: Colour
    crown: Colour
    tree: str
    tree_gap_m: float
    lamp: Colour
    lamp_gap_m: float
    bin: Colour
    coats: tuple[Colour, ...]
    cars: tuple[Colour, ...]
    safety: Colour  # cones, drums, work signs, vests
    stripes: Colour  # barricades and barriers
    machine: Colour
    mirror: float  # +1 where traffic keeps right, -1 where it keeps left


@dataclass(frozen=True)
class Drive:
    """What all frames of a drive have in common."""

    latitude: float
    longitude: float
    heading: tuple[float, float]  # degrees of latitude and longitude per metre driven
    weather: str
    daytime: str
    scene: str
    horizon: float  # share of the image height
    centre: float  # share of the image width
    focal: float  # image widths
    camera_m: float
    hood: float  # share of the image height that the bonnet hides
    balance: Colour  # the camera's white balance, factor of each channel
    contrast: float
    light: Light
    sky: tuple[Colour, Colour]  # zenith, horizon
    left_lanes: int
    parking_m: float
    sidewalk_m: float
    setback_m: float
    noise: float  # standard deviation, grey levels


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return 255 * red, 255 * green, 255 * blue


def safety_orange(d: Draws) -> Colour:
    """One of the oranges of cones, vests, cars and awnings alike."""
    return _hsv(d.uniform(0.025, 0.085), d.uniform(0.82, 1.0), d.uniform(0.88, 1.0))


@lru_cache(maxsize=4096)
def city_style(seed: int, city: int) -> CityStyle:
    """Style of a city, a function of (seed, city) alone.

    Cities lie on a grid of 2 degrees with a jitter of 0.3: 75 km apart at the least.
    """
    d = Draws((seed, CITY_STREAM, city))
    hue, tint = d.unit(), d.uniform(0.05, 0.4)
    walls = tuple(
        _hsv(hue + d.uniform(-0.12, 0.12), tint * d.uniform(0.4, 1.4), d.uniform(0.4, 0.92))
        for _ in range(4)
    )
    grey = d.uniform(70, 122)
    orange = safety_orange(d)
    low = d.pick((1, 2, 2, 3, 4, 6))
    car_hues = [_hsv(d.unit(), d.uniform(0.3, 0.95), d.uniform(0.3, 0.95)) for _ in range(4)]
    return CityStyle(
        latitude=30.0 + 2.0 * (city % 10) + d.uniform(-0.3, 0.3),
        longitude=-120.0 + 2.0 * (city // 10) + d.uniform(-0.3, 0.3),
        walls=walls,
        window=_hsv(d.uniform(0.5, 0.65), d.uniform(0.05, 0.4), d.uniform(0.15, 0.5)),
        window_share=(d.pick((0.4, 0.5, 0.62, 1.0)), d.uniform(0.38, 0.68)),
        floor_m=d.uniform(2.8, 3.7),
        floors=(low, low + d.integer(1, 6)),
        frontage_m=(d.uniform(6, 11), d.uniform(12, 26)),
        gabled=d.pick((0.0, 0.0, 0.5, 1.0)) if low < 4 else 0.0,
        roof=_hsv(d.pick((0.02, 0.05, 0.6)), d.uniform(0.1, 0.5), d.uniform(0.25, 0.6)),
        asphalt=d.near((grey, grey, grey * d.uniform(0.95, 1.08)), 5),
        pavement=d.near(d.pick(((168, 164, 156), (150, 128, 112), (190, 186, 178))), 14),
        verge=d.near(d.pick(((96, 124, 66), (128, 122, 78), (150, 132, 100), (80, 108, 62))), 14),
        centre_line=d.pick((WHITE, (232, 190, 60))),
        crown=_hsv(d.uniform(0.16, 0.38), d.uniform(0.35, 0.7), d.uniform(0.25, 0.55)),
        tree=d.pick(("tree", "tree", "conifer", "palm")),
        tree_gap_m=d.uniform(8, 34),
        lamp=d.near(d.pick(((60, 64, 66), (150, 152, 150), (50, 76, 62))), 10),
        lamp_gap_m=d.uniform(18, 40),
        bin=d.pick((orange, (60, 110, 66), (56, 76, 130), (80, 80, 82), (150, 46, 44))),
        coats=tuple(_hsv(d.unit(), d.uniform(0.1, 0.8), d.uniform(0.2, 0.85)) for _ in range(4)),
        cars=(*car_hues, (225, 226, 228), (30, 30, 34), (150, 153, 158), (196, 198, 200), orange),
        safety=orange,
        stripes=d.pick((orange, orange, (214, 40, 36), (40, 40, 42))),
        machine=d.pick((_hsv(d.uniform(0.1, 0.14), 0.9, 0.95), orange)),
        mirror=d.pick((1.0, 1.0, 1.0, -1.0)),
    )


_WEATHER = ("clear", "clear", "clear", "cloudy", "cloudy", "rain", "rain", "fog")
_DAYTIME = ("day", "day", "day", "dusk", "night")
_SCENE = ("urban", "urban", "residential", "residential", "highway", "rural")


def _light(d: Draws, weather: str, daytime: str) -> tuple[Light, tuple[Colour, Colour]]:
    """Illumination and the sky's zenith and horizon colours."""
    zenith: Colour
    low: Colour
    if weather == "clear":
        zenith, low = _hsv(d.uniform(0.55, 0.63), d.uniform(0.3, 0.65), 0.85), (214, 226, 236)
    else:
        zenith, low = d.near((168, 174, 182), 16), d.near((200, 204, 208), 12)
    base = {"clear": 1.0, "cloudy": 0.86, "rain": 0.74, "fog": 0.84}[weather]
    ambient: Colour = (base * d.uniform(0.96, 1.04), base, base * d.uniform(0.94, 1.06))
    headlight = 0.0
    if daytime == "dusk":
        glow = d.near((238, 158, 104) if weather == "clear" else (150, 140, 146), 16)
        zenith, low = darker(zenith, 0.55), glow
        ambient = (ambient[0] * 0.68, ambient[1] * 0.6, ambient[2] * 0.64)
        headlight = 0.12
    elif daytime == "night":
        zenith, low = d.near((14, 18, 34), 6), d.near((44, 42, 54), 8)
        ambient = (ambient[0] * 0.3, ambient[1] * 0.3, ambient[2] * 0.37)
        headlight = d.uniform(0.4, 0.6)
    length = {"clear": 420.0, "cloudy": 300.0, "rain": 130.0, "fog": d.uniform(50, 90)}[weather]
    light = Light(ambient, headlight, low, length, lamps_on=daytime != "day")
    return light, (zenith, low)


@lru_cache(maxsize=16384)
def drive_style(seed: int, city: int, drive: int) -> Drive:
    """Route, conditions and camera of a drive, a function of (seed, city, drive) alone.

    Drives of a city start on a grid of 0.04 by 0.05 degrees, 3 km at the least.
    """
    style = city_style(seed, city)
    d = Draws((seed, DRIVE_STREAM, city, drive))
    weather, daytime, scene = d.pick(_WEATHER), d.pick(_DAYTIME), d.pick(_SCENE)
    light, sky = _light(d, weather, daytime)
    open_road = scene in ("highway", "rural")
    north = d.chance(0.5)
    return Drive(
        latitude=style.latitude + 0.04 * (drive % 8),
        longitude=style.longitude + 0.05 * (drive // 8),
        heading=(9.0e-6, 0.0) if north else (0.0, 9.0e-6),
        weather=weather,
        daytime=daytime,
        scene=scene,
        horizon=d.uniform(0.38, 0.5),
        centre=d.uniform(0.44, 0.56),
        focal=d.uniform(0.8, 1.05),
        camera_m=d.uniform(1.2, 1.9),
        hood=d.pick((0.0, 0.0, d.uniform(0.03, 0.09))),
        balance=(d.uniform(0.93, 1.07), 1.0, d.uniform(0.92, 1.08)),
        contrast=d.uniform(0.85, 1.12),
        light=light,
        sky=sky,
        left_lanes=2 if scene == "highway" else d.integer(1, 2),
        parking_m=d.pick((0.0, 2.3)) if not open_road else 0.0,
        sidewalk_m=d.uniform(1.8, 4.5) if not open_road else 0.0,
        setback_m={"urban": 0.0, "residential": d.uniform(2, 7)}.get(scene, d.uniform(9, 20)),
        noise=d.uniform(1.5, 4.0) * (1.8 if daytime == "night" else 1.0),
    )


def road_edges(style: CityStyle, drive: Drive) -> tuple[float, float]:
    """X of the left and the right kerb."""
    near, far = 0.5 * LANE_M + drive.parking_m, (drive.left_lanes + 0.5) * LANE_M
    edges = (-far - drive.parking_m, near)
    return edges if style.mirror > 0 else (-edges[1], -edges[0])


class Street:
    """Draws the empty street from the sky to the lane markings."""

    def __init__(self, style: CityStyle, drive: Drive, camera: Camera, d: Draws) -> None:
        self.style, self.drive, self.camera, self.d = style, drive, camera, d
        self.left, self.right = road_edges(style, drive)
        self.image = self._sky()
        self.canvas = ImageDraw.Draw(self.image)

    def draw(self) -> None:
        """Paint everything that cannot hide an object on the road."""
        self._clouds()
        self._skyline()
        self._ground()
        for side in (-1.0, 1.0):
            self._houses(side)
        self._markings()

    def _sky(self) -> Image.Image:
        camera, (zenith, low) = self.camera, self.drive.sky
        ramp = bytearray()
        for row in range(32):
            t = row / 31
            ramp += bytes(int(a + (b - a) * t) for a, b in zip(zenith, low, strict=True))
        column = Image.frombytes("RGB", (1, 32), bytes(ramp))
        image = Image.new("RGB", (camera.width, camera.height))
        rows = int(camera.horizon_y) + 2
        image.paste(
            column.resize((1, rows), Image.Resampling.BILINEAR).resize((camera.width, rows))
        )
        return image

    def _clouds(self) -> None:
        if self.drive.weather == "fog":
            return
        camera, d = self.camera, self.d
        zenith, low = self.drive.sky
        mixed = tuple(
            int(min(255.0, 0.35 * a + 0.65 * b + 12)) for a, b in zip(zenith, low, strict=True)
        )
        for _ in range(d.integer(0, 4)):
            x, y = d.uniform(0, camera.width), d.uniform(0, 0.8 * camera.horizon_y)
            for _ in range(4):
                w, h = camera.width * d.uniform(0.04, 0.13), camera.height * d.uniform(0.01, 0.035)
                cx, cy = x + w * d.uniform(-1, 1), y + h * d.uniform(-0.6, 0.6)
                self.canvas.ellipse((cx - w, cy - h, cx + w, cy + h), mixed)

    def _skyline(self) -> None:
        camera, d, light = self.camera, self.d, self.drive.light
        x, base = 0.0, camera.horizon_y
        green = self.drive.scene in ("rural", "residential")
        while x < camera.width:
            width = camera.width * d.uniform(0.03, 0.09)
            tall = camera.height * d.uniform(0.01, 0.05 if green else 0.11)
            colour = self.style.crown if green else d.pick(self.style.walls)
            fill = light.shade(darker(colour, 0.8), 150.0)
            if green:
                self.canvas.ellipse((x - width, base - tall, x + width, base + tall), fill)
            else:
                self.canvas.rectangle((x, base - tall, x + width, base + 1), fill)
            x += width

    def _strip(self, x0: float, x1: float, z0: float, z1: float, colour: Colour) -> None:
        """Quadrilateral on the ground, lit as at its middle."""
        project = self.camera.project
        self.canvas.polygon(
            [project(x0, 0, z1), project(x1, 0, z1), project(x1, 0, z0), project(x0, 0, z0)],
            self.drive.light.shade(colour, 0.5 * (z0 + z1)),
        )

    def _ground(self) -> None:
        style, drive, camera = self.style, self.drive, self.camera
        wet = 0.8 if drive.weather == "rain" else 1.0
        side = style.pavement if drive.scene == "urban" else style.verge
        walk, gutter = drive.sidewalk_m, darker(style.pavement, 0.8)
        distances = (400.0, 90.0, 55.0, 38.0, 27.0, 20.0, 15.0, 11.0, 8.0, 6.0, 4.0, 2.0)
        for z1, z0 in pairwise(distances):
            far_y, near_y = camera.project(0, 0, z1)[1], camera.project(0, 0, z0)[1]
            middle = 0.5 * (z0 + z1)
            self.canvas.rectangle((0, far_y, camera.width, near_y), drive.light.shade(side, middle))
            if walk:
                self._strip(self.left - walk, self.right + walk, z0, z1, style.pavement)
                self._strip(self.left - 0.2, self.right + 0.2, z0, z1, gutter)
            self._strip(self.left, self.right, z0, z1, darker(style.asphalt, wet))

    def _markings(self) -> None:
        style, drive, d = self.style, self.drive, self.d
        for _ in range(d.integer(0, 3)):  # mended asphalt
            x, z, patch = d.uniform(self.left, self.right - 1), d.uniform(5, 30), d.uniform(1, 3)
            self._strip(x, x + 1.2, z, z + patch, darker(style.asphalt, d.uniform(0.78, 1.12)))
        dash, phase = d.uniform(2, 4), d.uniform(0, 6)
        lanes = range(1, drive.left_lanes + 1)
        for k in lanes:
            x = -style.mirror * LANE_M * (k - 0.5)
            middle = k == 1 and drive.scene != "highway"
            colour = style.centre_line if middle else WHITE
            z = 2.5 + phase
            while z < 80:
                self._strip(x - 0.08, x + 0.08, z, z + dash, colour)
                z += 2.2 * dash
        if drive.scene != "residential":
            for x in (self.left + 0.3, self.right - 0.3):
                for z0, z1 in ((2.5, 8), (8, 20), (20, 90)):
                    self._strip(x - 0.07, x + 0.07, z0, z1, WHITE)
        if drive.scene in ("urban", "residential") and d.chance(0.3):  # zebra crossing
            z, x = d.uniform(7, 28), self.left + 0.3
            while x < self.right - 0.4:
                self._strip(x, x + 0.5, z, z + 3, WHITE)
                x += 1.0

    def _houses(self, side: float) -> None:
        """Row of houses along one side, from far to near."""
        style, drive, d = self.style, self.drive, self.d
        edge = self.right if side > 0 else -self.left
        front = edge + max(drive.sidewalk_m, 1.0) + drive.setback_m
        sparse = {"urban": 0.06, "residential": 0.3, "highway": 0.72, "rural": 0.8}[drive.scene]
        top = style.floors if drive.scene == "urban" else (1, min(3, style.floors[1]))
        lots: list[tuple[float, float, int, Colour]] = []
        z = d.uniform(3, 9)
        while z < FAR_M and len(lots) < 9:
            length = d.uniform(*style.frontage_m) * (1.0 if z < 50 else 2.0)
            if not d.chance(sparse):
                lots.append((z, z + length, d.integer(*top), d.near(d.pick(style.walls), 22)))
            z += length + (0.0 if drive.scene == "urban" and d.chance(0.8) else d.uniform(3, 9))
        for z0, z1, floors, wall in reversed(lots):
            self._house(side * front, side, (z0, z1), floors, wall)

    def _house(
        self, x: float, side: float, span: tuple[float, float], floors: int, wall: Colour
    ) -> None:
        style, d, light, project = self.style, self.d, self.drive.light, self.camera.project
        z0, z1 = span
        tall, middle = floors * style.floor_m + 0.6, 0.5 * (z0 + z1)
        deep = x + side * 9.0
        gabled = d.chance(style.gabled) and floors <= 3
        # The gable end faces the camera, the long front the street.
        end = [
            project(x, 0, z0),
            project(x, tall, z0),
            project(deep, tall, z0),
            project(deep, 0, z0),
        ]
        if gabled:
            ridge = x + side * 4.5
            end.insert(2, project(ridge, tall + 3.0, z0))
            roof = [
                project(x, tall, z0),
                project(ridge, tall + 3.0, z0),
                project(ridge, tall + 3.0, z1),
                project(x, tall, z1),
            ]
            self.canvas.polygon(roof, light.shade(style.roof, middle))
        self.canvas.polygon(end, light.shade(darker(wall, 0.72), z0))
        front = [project(x, 0, z0), project(x, tall, z0), project(x, tall, z1), project(x, 0, z1)]
        self.canvas.polygon(front, light.shade(darker(wall, 0.92), middle))
        if abs(front[0][0] - front[2][0]) > 0.02 * self.camera.width:
            self._windows(x, span, floors)

    def _windows(self, x: float, span: tuple[float, float], floors: int) -> None:
        style, d, light, project = self.style, self.d, self.drive.light, self.camera.project
        (z0, z1), (wide, high) = span, style.window_share
        bays = 1 if wide >= 1.0 else max(2, min(5, int((z1 - z0) / 3.2)))
        bay = (z1 - z0) / bays
        dark = light.shade(style.window, 0.5 * (z0 + z1))
        warm = (226, 188, 118)
        for k in range(bays):
            near = z0 + (k + 0.5 * (1 - wide)) * bay + 0.3
            far = near + wide * bay - 0.6
            if project(x, 0, near)[0] * (1 if x > 0 else -1) < -0.2 * self.camera.width:
                continue
            for floor in range(min(floors, 7)):
                low = (floor + 0.5 * (1 - high)) * style.floor_m + 0.3
                top = low + high * style.floor_m
                lit = light.lamps_on and d.chance(0.3)
                self.canvas.polygon(
                    [
                        project(x, low, near),
                        project(x, top, near),
                        project(x, top, far),
                        project(x, low, far),
                    ],
                    warm if lit else dark,
                )
