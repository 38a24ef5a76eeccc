"""Column names and Arrow schemas of the raw shards and of the split files.

The raw schema is the NATIX data set's (image struct, label, scene description, position, weather, time
of day, scene) plus the columns this pipeline needs: `id`, `source`, `group`, `drive`, `evidence_box`
and `extra` (a JSON object with whatever else a source had).
"""

from __future__ import annotations

import json

import pyarrow as pa

CLASS_NAMES = ("None", "Roadwork")
SPLITS = ("train", "val_select", "val_calib", "val_test")
# Images as they are, and as the configured validator sends them.
CONDITIONS = ("clean", "served")

# Where `extra` keeps a label and a position that a source gave but that were not understood.
UNREAD_LABEL, UNREAD_POSITION = "label", "gps"

_CONTEXT = [
    pa.field("source", pa.string(), nullable=False),
    # The coarsest unit within which images are not independent: a city or site. Never crosses a split.
    pa.field("group", pa.string()),
    pa.field("drive", pa.string()),
    pa.field("scene_description", pa.string()),
    pa.field("latitude", pa.float64()),
    pa.field("longitude", pa.float64()),
    pa.field("weather", pa.string()),
    pa.field("daytime", pa.string()),
    pa.field("scene", pa.string()),
    # x0, y0, x1, y1 of the roadwork, relative to the upright image, each in [0, 1].
    pa.field("evidence_box", pa.list_(pa.float32(), 4)),
    pa.field("extra", pa.string()),
]

RAW_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        # 1 = roadwork, 0 = none, null = the source had no usable label (quarantined by `prepare`).
        pa.field("label", pa.int8()),
        *_CONTEXT,
    ]
)

SPLIT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # upright RGB JPEG at training size
        pa.field("label", pa.int8(), nullable=False),
        *[field.with_nullable(False) if field.name == "group" else field for field in _CONTEXT],
        pa.field("width", pa.int32(), nullable=False),  # of the stored image, pixels
        pa.field("height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),  # upright, before resizing
        pa.field("original_height", pa.int32(), nullable=False),
        # True: TRAIN's fusion part, which `train` takes no gradient from. False in other splits.
        pa.field("fusion", pa.bool_(), nullable=False),
    ]
)


def unread_value(extra: str | None, name: str) -> str | None:
    """Return what `extra` keeps of a label or position that was given but not understood, else None."""
    if extra is None or f'"{name}"' not in extra:
        return None
    value = json.loads(extra).get(name)
    return None if value is None else str(value)


# Image files as they came.
ORIGINALS_SCHEMA = pa.schema(
    [pa.field("id", pa.string(), nullable=False), pa.field("image", pa.binary(), nullable=False)]
)
