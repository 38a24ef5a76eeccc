"""What stands where in a synthetic scene: work zones, decoys and street life."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streetvision.sources.renderer.objects import KINDS, Colour, Draws
from streetvision.sources.renderer.street import (
    LANE_M,
    Camera,
    CityStyle,
    Drive,
    road_edges,
    safety_orange,
)

LARGEST_PX = 120.0  # height of the main element in an image 256 pixels wide
MIN_EVIDENCE_PX = 11.0  # longer side of the evidence box, at the same width
MAX_HIDDEN = 0.4  # share of the evidence's area that nearer objects may cover

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Item:
    """An object on the ground."""

    kind: str
    x: float  # metres to the right
    z: float  # metres ahead
    colour: Colour
    size: float = 1.0
    flip: float = 1.0

    def box(self, camera: Camera) -> Box:
        """Bounding box on the canvas, not clipped."""
        kind = KINDS[self.kind]
        scale = camera.focal / self.z * self.size
        x, y = camera.project(self.x, 0.0, self.z)
        half = kind.half_width_m * scale
        return x - half, y - kind.height_m * scale, x + half, y


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def clip(box: Box, to: Box) -> Box:
    """Intersect two boxes; sides cross over where they do not meet."""
    return max(box[0], to[0]), max(box[1], to[1]), min(box[2], to[2]), min(box[3], to[3])


def free_frame(camera: Camera, drive: Drive) -> Box:
    """Return the part of the canvas that the bonnet leaves free."""
    return 0.0, 0.0, float(camera.width), camera.height * (1.0 - drive.hood)


# Kinds of main elements; a kind named twice comes twice as often.
_WORK: tuple[str, ...] = (
    *("cone", "cone", "cone", "drum", "barricade", "barricade", "work_sign", "work_sign"),
    *("arrow_board", "excavator", "excavator", "mesh_fence", "water_barrier"),
)
_DECOYS: tuple[str, ...] = (
    *("bin", "bin", "hivis", "planter", "scooter", "stall", "billboard", "yellow_sign"),
    *("yellow_sign", "panel_sign", "display", "lorry_side", "car", "car_side", "truck"),
    *("bus", "plank_fence", "flower_bed"),
)
# Least height of the main element in an image 256 pixels wide, post and boom included.
_SMALLEST_PX = {"cone": 13.0, "water_barrier": 14.0, "drum": 16.0}
_SMALLEST_PX |= dict.fromkeys(("work_sign", "arrow_board", "excavator", "yellow_sign"), 32.0)
_SMALLEST_PX |= dict.fromkeys(("panel_sign", "display", "lorry_side", "truck", "bus"), 32.0)
_ON_ROAD = ("cone", "drum", "barricade", "car", "car_side", "truck", "bus")


class Composer:
    """Chooses what stands where in one scene."""

    def __init__(self, style: CityStyle, drive: Drive, camera: Camera, d: Draws) -> None:
        self.style, self.drive, self.camera, self.d = style, drive, camera, d
        self.left, self.right = road_edges(style, drive)
        self.frame = free_frame(camera, drive)

    def focus(self, label: int) -> list[Item]:
        """Place the work zone of a positive, the decoy of a negative (empty in one of twelve)."""
        d = self.d
        if not label and d.chance(1 / 12):
            return []
        while True:
            anchor = self._anchor(d.pick(_WORK if label else _DECOYS))
            group = [anchor, *(self._zone(anchor) if label else self._decoys(anchor))]
            group = [item for item in group if self._visible(item)]
            if group and group[0] is anchor and self._large(anchor):
                return group

    def _anchor(self, kind: str) -> Item:
        """Place the main element: its height in pixels is drawn, the distance follows."""
        d, camera, shape = self.d, self.camera, KINDS[kind]
        size = d.uniform(0.9, 1.15)
        pixels = d.log_uniform(_SMALLEST_PX.get(kind, 20.0), LARGEST_PX) * camera.width / 256
        nearest = camera.focal * camera.height_m / (self.frame[3] - 4 - camera.horizon_y)
        z = max(nearest, camera.focal * shape.height_m * size / pixels)
        if kind in _ON_ROAD and d.chance(0.6):
            x = d.uniform(self.left + 0.6, self.right - 0.6)
        else:
            edge, side = (self.right, 1.0) if d.chance(0.6) else (self.left, -1.0)
            x = edge + side * d.uniform(-0.8, 1.8)
        # Within the frame, so that near zones are not lost.
        reach = camera.width / camera.focal * z
        lowest = -camera.centre_x / camera.width * reach
        half = min(shape.half_width_m * size, 0.45 * reach)
        x = min(max(x, lowest + half), lowest + reach - half)
        return Item(kind, x, z, self._colour(kind), size, d.pick((1.0, -1.0)))

    def _colour(self, kind: str) -> Colour:
        d, style = self.d, self.style
        if kind in ("barricade", "water_barrier"):
            return d.near(style.stripes, 10)
        if kind in ("excavator", "bus", "lorry_side"):
            return d.near(style.machine, 10)
        if kind in ("worker", "hivis"):
            return d.pick((style.safety, style.safety, (206, 232, 56)))
        return d.near(style.safety, 10)

    def _visible(self, item: Item) -> bool:
        box = item.box(self.camera)
        tall = (box[3] - box[1]) * 256 / self.camera.width
        return tall >= 6.0 and _area(clip(box, self.frame)) >= 0.6 * _area(box)

    def _large(self, item: Item) -> bool:
        left, top, right, bottom = clip(item.box(self.camera), self.frame)
        return max(right - left, bottom - top) * 256 / self.camera.width >= MIN_EVIDENCE_PX

    def _beside(self, anchor: Item, kind: str, dx: float, dz: float) -> Item:
        d, nearest = self.d, 0.6 * anchor.z
        z = max(nearest, anchor.z + dz)
        return Item(kind, anchor.x + dx, z, self._colour(kind), anchor.size, d.pick((1.0, -1.0)))

    def _row(self, anchor: Item, kind: str, count: int) -> list[Item]:
        """Taper: equal steps from the anchor towards the distance and across the road."""
        d = self.d
        inward = -1.0 if anchor.x > 0.5 * (self.left + self.right) else 1.0
        dx, dz = inward * d.uniform(0.25, 0.9), d.uniform(0.12, 0.22) * anchor.z
        return [
            replace(anchor, kind=kind, x=anchor.x + k * dx, z=anchor.z + k * dz, flip=1.0)
            for k in range(1, count)
        ]

    def _zone(self, anchor: Item) -> list[Item]:
        d, kind = self.d, anchor.kind
        if kind in ("cone", "drum"):
            group = self._row(anchor, kind, d.integer(3, 7))
        elif kind in ("barricade", "mesh_fence", "water_barrier"):
            step = 2.0 * KINDS[kind].half_width_m * anchor.size + 0.1
            group = [
                replace(anchor, x=anchor.x + k * step * d.pick((1.0, -1.0)))
                for k in range(1, d.integer(1, 3))
            ]
        else:
            group = []
        if kind != "cone" and d.chance(0.45):
            first = self._beside(anchor, "cone", d.uniform(-2, 2), -d.uniform(0.5, 2.5))
            group += [first, *self._row(first, "cone", d.integer(2, 4))]
        if kind != "work_sign" and d.chance(0.2):
            group.append(self._beside(anchor, "work_sign", d.uniform(-3, 3), d.uniform(1, 8)))
        if kind != "excavator" and d.chance(0.15):
            group.append(self._beside(anchor, "excavator", d.uniform(-3, 3), d.uniform(3, 12)))
        if d.chance(0.35):
            for _ in range(d.integer(1, 3)):
                group.append(self._beside(anchor, "worker", d.uniform(-3, 3), d.uniform(0.5, 5)))
        return group

    def _decoys(self, anchor: Item) -> list[Item]:
        d, kind = self.d, anchor.kind
        group = []
        if kind in ("bin", "planter", "scooter", "hivis"):
            count = d.integer(1, 5)
            step = d.uniform(0.8, 1.6) * d.pick((1.0, -1.0))
            depth = d.uniform(0.0, 0.2) * anchor.z
            group = [
                replace(anchor, x=anchor.x + k * step, z=anchor.z + k * depth)
                for k in range(1, count)
            ]
        elif kind in ("plank_fence", "flower_bed"):
            step = 2.0 * KINDS[kind].half_width_m * anchor.size
            group = [replace(anchor, x=anchor.x + k * step) for k in range(1, d.integer(1, 3))]
        for _ in range(d.integer(0, 3)):
            other = d.pick(("bin", "hivis", "planter", "yellow_sign", "scooter", "panel_sign"))
            group.append(self._beside(anchor, other, d.uniform(-3, 3), d.uniform(-2, 6)))
        return group

    def street_life(self) -> list[Item]:
        """Objects of both classes: traffic, people, trees, lamps, signs, and decoys among them."""
        return [*self._traffic(), *self._people(), *self._trees_and_lamps(), *self._furniture()]

    def _traffic(self) -> list[Item]:
        d, style, drive = self.d, self.style, self.drive
        items = []
        lanes = [0.0, *(-style.mirror * LANE_M * k for k in range(1, drive.left_lanes + 1))]
        for _ in range(d.integer(0, 4)):
            kind = d.pick(("car", "car", "car", "car", "truck", "bus"))
            x = d.pick(lanes) + d.uniform(-0.3, 0.3)
            items.append(Item(kind, x, d.log_uniform(9, 90), d.near(d.pick(style.cars), 12)))
        if drive.parking_m:
            for edge, inward in ((self.right, -1.1), (self.left, 1.1)):
                z = d.uniform(6, 20)
                while z < 60:
                    kind = d.pick(("car", "car", "car", "car", "truck"))
                    items.append(Item(kind, edge + inward, z, d.near(d.pick(style.cars), 12)))
                    z += d.uniform(5.5, 22)
        return items

    def _people(self) -> list[Item]:
        d, style, drive = self.d, self.style, self.drive
        items = []
        walkers = 5 if drive.scene == "urban" else 2 if drive.scene == "residential" else 0
        for _ in range(d.integer(0, walkers)):
            kind = d.pick(("pedestrian", "pedestrian", "pedestrian", "hivis"))
            colour = self._colour(kind) if kind == "hivis" else d.pick(style.coats)
            items.append(Item(kind, self._roadside(0.5, 3.0), d.log_uniform(7, 45), colour))
        return items

    def _trees_and_lamps(self) -> list[Item]:
        d, style, drive = self.d, self.style, self.drive
        items = []
        for side, edge in ((1.0, self.right), (-1.0, self.left)):
            z = d.uniform(5, 5 + style.tree_gap_m)
            while z < 70:
                x = edge + side * (1.4 + 0.3 * drive.setback_m + d.uniform(-0.3, 0.6))
                items.append(Item(style.tree, x, z, d.near(style.crown, 14), d.uniform(0.8, 1.3)))
                z += style.tree_gap_m * d.uniform(0.7, 1.3)
        if drive.scene != "rural":
            z = d.uniform(8, 8 + style.lamp_gap_m)
            while z < 80:
                side = style.mirror
                edge = self.right if side > 0 else self.left
                items.append(Item("lamp", edge + 0.5 * side, z, style.lamp, flip=-side))
                z += style.lamp_gap_m
        return items

    def _furniture(self) -> list[Item]:
        d, style, drive = self.d, self.style, self.drive
        items = []
        for _ in range(d.integer(0, 3)):
            kind = d.pick(("yellow_sign", "round_sign", "round_sign", "panel_sign", "display"))
            kind = "traffic_light" if drive.scene == "urban" and d.chance(0.25) else kind
            colour = d.near(d.pick(style.cars), 10)
            items.append(Item(kind, self._roadside(0.4, 1.2), d.log_uniform(9, 55), colour))
        for _ in range(d.integer(0, 3)):
            kind = d.pick(("bin", "bin", "planter", "scooter", "billboard", "stall", "flower_bed"))
            colour = d.pick((style.bin, style.bin, safety_orange(d), d.pick(style.coats)))
            items.append(Item(kind, self._roadside(1.0, 3.5), d.log_uniform(7, 45), colour))
        return items

    def occluder(self, focus: list[Item]) -> list[Item]:
        """Sometimes something right in front of the focus."""
        d, camera = self.d, self.camera
        if not focus or not d.chance(0.3):
            return []
        target = d.pick(focus)
        z = target.z * d.uniform(0.6, 0.9)
        if z < 5.0:
            return []
        left, _, right, _ = target.box(camera)
        x = (d.uniform(left, right) - camera.centre_x) * z / camera.focal
        kind = d.pick(("car", "car", "pedestrian", "lamp", "round_sign", "bin", self.style.tree))
        colour = {"lamp": self.style.lamp, self.style.tree: self.style.crown}.get(kind)
        return [Item(kind, x, z, colour or d.pick(self.style.cars))]

    def admit(self, life: list[Item], focus: list[Item]) -> list[Item]:
        """Keep what neither stands inside the focus nor hides too much of it."""
        clipped = [(item, clip(item.box(self.camera), self.frame)) for item in focus]
        budget = MAX_HIDDEN * sum(_area(box) for _, box in clipped)
        kept = []
        for item in life:
            half = KINDS[item.kind].half_width_m
            if item.z < 4.0 or any(
                abs(item.z - other.z) < 1.0
                and abs(item.x - other.x) < half + KINDS[other.kind].half_width_m
                for other in focus
            ):
                continue
            own = item.box(self.camera)
            hidden = sum(_area(clip(own, box)) for other, box in clipped if other.z > item.z)
            if hidden <= budget:
                budget -= hidden
                kept.append(item)
        return kept

    def _roadside(self, low: float, high: float) -> float:
        d = self.d
        if d.chance(0.55):
            return self.right + d.uniform(low, high)
        return self.left - d.uniform(low, high)
