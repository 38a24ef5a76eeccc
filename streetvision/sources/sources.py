"""The sources of labelled images, each divided into the rows of its shards.

Planning looks at what is there (names, columns, sizes) and reads no image; the parts it returns are
small and picklable, and each yields the rows of one shard, wherever it is run.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from streetvision.core.errors import UserError
from streetvision.core.params import (
    CsvSource,
    FolderSource,
    HubSource,
    NamedClasses,
    ParquetSource,
    Source,
    SyntheticSource,
)
from streetvision.sources.files import plan_csv, plan_folder
from streetvision.sources.hub import download_dataset
from streetvision.sources.labels import SURE_NAMES, ClassNames
from streetvision.sources.natix import find_parquet, plan_parquet
from streetvision.sources.parts import Plan, Row, local_path, slices
from streetvision.sources.values import text

SYNTHETIC_JPEG_QUALITY = 90


def plan_source(source: Source, local_root: Path, *, shard_images: int, seed: int) -> Plan:
    """Divide a source into shards of `shard_images` rows (the last one smaller).

    Raises
    ------
    UserError
        The source is missing or empty, lies outside `local_root`, or lacks a column.
    """
    place = f'source "{source.name}"'
    classes = SURE_NAMES
    if isinstance(source, NamedClasses):
        classes = ClassNames(source.positive_classes, source.negative_classes)
    match source:
        case SyntheticSource():
            plan = _plan_synthetic(source, shard_images, seed)
        case FolderSource():
            plan = plan_folder(source, local_root, shard_images)
        case CsvSource():
            plan = plan_csv(source, local_root, shard_images)
        case ParquetSource():
            found = find_parquet(local_path(local_root, source.path, place), place)
            plan = plan_parquet(source.name, found, shard_images, classes)
        case HubSource():
            found = download_dataset(source.repo_id, source.revision, source.files)
            plan = plan_parquet(source.name, found, shard_images, classes)
    if not plan.parts:
        raise UserError(f"{place} holds no images")
    return plan


@dataclass(frozen=True)
class SyntheticPart:
    """Rendered scenes `start` … `stop - 1`."""

    source: SyntheticSource
    seed: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Number of scenes."""
        return self.stop - self.start

    def read(self) -> Iterator[Row]:
        """Render scene after scene; each depends on the seed and its own index only."""
        from streetvision.sources.renderer.scenes import render_scene

        for index in range(self.start, self.stop):
            scene = render_scene(
                self.seed,
                index,
                cities=self.source.cities,
                drives_per_city=self.source.drives_per_city,
                positive_share=self.source.positive_share,
                width_px=self.source.width_px,
                height_px=self.source.height_px,
            )
            buffer = io.BytesIO()
            scene.image.save(buffer, "JPEG", quality=SYNTHETIC_JPEG_QUALITY)
            name = f"{self.source.name}-{index:06d}"
            yield {
                "id": name,
                "image": {"bytes": buffer.getvalue(), "path": f"{name}.jpg"},
                "label": scene.label,
                "source": self.source.name,
                "group": scene.city,
                "drive": scene.drive,
                "scene_description": text(scene.scene_description),
                "latitude": scene.latitude,
                "longitude": scene.longitude,
                "weather": scene.weather,
                "daytime": scene.daytime,
                "scene": scene.scene,
                "evidence_box": scene.evidence_box,
            }


def _plan_synthetic(source: SyntheticSource, shard_images: int, seed: int) -> Plan:
    shards = slices(source.images, shard_images)
    return Plan([SyntheticPart(source, seed, start, stop) for start, stop in shards])
