"""From raw shards to the four split files, in two passes.

Pass 1 (`prepare_parts`) decodes each row group of each raw shard into a part file. Pass 2 reads only the
light columns of the parts, finds near-duplicates, groups and splits, then streams the images into the
split files.
Neither pass holds more than a few hundred images; about 1 kB an image stays in memory: its id and group,
and what near-duplicates are found by.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from streetvision.core.artifacts import write_atomic, write_csv_atomic
from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.core.params import Data
from streetvision.core.progress import Progress, no_progress
from streetvision.core.schema import (
    ORIGINALS_SCHEMA,
    SPLIT_SCHEMA,
    SPLITS,
    UNREAD_POSITION,
    unread_value,
)
from streetvision.prepare import duplicates
from streetvision.prepare.groups import GroupReport, assign_groups
from streetvision.prepare.split import SplitResult, part_shares, split_groups
from streetvision.prepare.workers import PART_SCHEMA, Part, make_parts, read_raw

log = logging.getLogger(__name__)

_WRITE_ROWS = 500
_MAX_LISTED_GROUPS = 100
_ELSEWHERE = "near-duplicate of an image in another group"
# Joined groups that are worth a warning: a chain from place to place, or a large part of the images.
_MANY_PLACES, _MANY_IMAGES = 3, 0.1
_SHOWN_COPIES = 4  # ids of images with two labels that a warning lists


def prepare_splits(
    raw_folder: Path,
    split_paths: Mapping[str, Path],
    originals_path: Path,
    quarantine_path: Path,
    scratch: Path,
    data: Data,
    seed: int,
    workers: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Decode, check, group and split all raw rows; return the content of `metrics/data.json`.

    The files depend on the raw rows, `data` and `seed` alone, not on `workers` or on interruptions.
    Unusable rows go to the quarantine file, also when there are so many that the call fails.

    Parameters
    ----------
    raw_folder
        Holds `*.parquet` in `RAW_SCHEMA`.
    split_paths
        Arrow file of each split.
    originals_path
        Arrow file for the original files of at most `data.test_originals` images of VAL_TEST.
    quarantine_path
        CSV with id, source, reason, file, row (counted from 0 in that file).
    scratch
        Existing folder for part files; what is in it must come from the same raw rows and `data`.
    data
        Section `data` of the parameters.
    seed
        Of the split.
    workers
        Processes; 0 for one a core, 1 for none beside this one.
    progress
        Wraps the iteration over parts: `progress(iterable, total, description)`.

    Raises
    ------
    UserError
        On unreadable shards, repeated ids, too many unusable rows, or too few groups or classes.
    """
    parts = make_parts(raw_folder, scratch, data, workers, progress)
    rows, thumbnails = _read_rows(parts)
    _check_ids(rows.ids)
    _quarantine_conflicts(rows)
    _write_quarantine(quarantine_path, rows, parts)
    _check_quarantine(rows, data.max_bad_fraction, quarantine_path)
    largest = max(part_shares(data.fractions, data.fusion_fraction).values())
    kept, groups, duplicate_report, group_report = _group(
        rows, thumbnails, data, largest_share=largest, divided=True
    )
    del thumbnails  # a quarter of what is held of an image, and not needed any more
    _write_quarantine(quarantine_path, rows, parts)  # again, with what was set aside
    result = split_groups(groups, rows.labels[kept], data.fractions, data.fusion_fraction, seed)
    _write_splits(parts, split_paths, kept, groups, result, progress)
    originals = _write_originals(
        parts, originals_path, split_paths["val_test"], data.test_originals, seed, progress
    )
    report = _report_files(split_paths, group_report)
    if report["shared_groups"]:
        raise RuntimeError(f"{report['shared_groups']} groups cross the splits: a bug in the split")
    return report | {
        "test_originals": originals,
        "rows_in": len(rows.ids),
        "rows_kept": len(kept),
        "quarantined": dict(Counter(reason for reason in rows.reasons if reason)),
        "duplicates": vars(duplicate_report),
        "positions_not_understood": _count_unread_positions(parts),
    }


def prepare_whole(
    raw_folder: Path,
    path: Path,
    scratch: Path,
    data: Data,
    workers: int,
    progress: Progress = no_progress,
    *,
    divided: bool = False,
) -> None:
    """Decode, check and group all raw rows into one file in the split schema, without a split.

    Unusable rows are left out and logged. If the groups will be `divided`, as for cross-validation,
    near-duplicates in other groups are left out, too; what is evaluated as a whole keeps them.

    Raises
    ------
    UserError
        On unreadable shards, repeated ids, or no usable row.
    """
    parts = make_parts(raw_folder, scratch, data, workers, progress)
    rows, thumbnails = _read_rows(parts)
    _check_ids(rows.ids)
    _quarantine_conflicts(rows)
    for reason, times in Counter(reason for reason in rows.reasons if reason).items():
        log.warning("%d of %d images left out: %s", times, len(rows.ids), reason)
    if all(rows.reasons):
        raise UserError(f"none of the {len(rows.ids)} images can be used")
    kept, groups, _, _ = _group(rows, thumbnails, data, largest_share=1.0, divided=divided)
    whole = np.full(len(kept), "whole", dtype=object)
    result = SplitResult(whole, np.zeros(len(kept), np.bool_))
    _write_splits(parts, {"whole": path}, kept, groups, result, progress)


def _group(
    rows: _Rows,
    thumbnails: NDArray[np.uint8],
    data: Data,
    *,
    largest_share: float,
    divided: bool,
) -> tuple[NDArray[np.int64], NDArray[np.object_], duplicates.DuplicateReport, GroupReport]:
    """Return the usable rows and their final groups, with what was found on the way.

    A group that near-duplicates join has at most `largest_share` of the images. If `divided`, the
    images that would still have a near-duplicate in another group are marked as unusable.
    """
    kept = np.flatnonzero([reason is None for reason in rows.reasons])
    if len(kept) < len(rows.ids):  # else a copy would be in vain
        thumbnails = thumbnails[kept]
    both = kept[duplicates.contradicted(thumbnails, rows.labels[kept])]
    if len(both):
        log.warning(
            "%d images have a copy with the other label, such as %s: they teach nothing and are counted "
            "as mistakes; find out which label is right",
            len(both), ", ".join(escaped(rows.ids[row]) for row in both[:_SHOWN_COPIES]),
        )  # fmt: skip
    alike = (
        duplicates.perceptual_hashes(thumbnails),
        thumbnails,
        data.duplicate_hash_bits,
        data.duplicate_pixel_error,
    )
    cluster, found = duplicates.near_duplicate_clusters(*alike, data.duplicate_max_cluster)
    groups, joined = assign_groups(
        [rows.ids[row] for row in kept],
        [rows.given[row] for row in kept],
        rows.latitude[kept],
        rows.longitude[kept],
        cluster,
        data.group_by,
        data.gps_cell_m,
        data.duplicate_max_groups,
        int(largest_share * len(kept)),
    )
    if joined.most_joined >= _MANY_PLACES or joined.largest_joined_images > _MANY_IMAGES * len(
        kept
    ):
        log.warning(
            "near-duplicates make one group of up to %d places (data.duplicate_max_groups = %d); "
            "the largest of several places holds %d of %d images",
            joined.most_joined,
            data.duplicate_max_groups,
            joined.largest_joined_images,
            len(kept),
        )
    if divided and (found.capped or joined.refused):
        names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        rank = np.empty(len(names), np.int64)
        rank[np.argsort(-sizes, kind="stable")] = np.arange(len(names))
        elsewhere = duplicates.duplicated_elsewhere(*alike, rank[codes])
        for row in kept[elsewhere]:
            rows.reasons[row] = _ELSEWHERE
        if elsewhere.any():
            log.warning(
                "%d of %d images are set aside: each has a near-duplicate in a larger group, and "
                "these may not be joined into one beyond data.duplicate_max_cluster = %d images, "
                "data.duplicate_max_groups = %d places or %.0f %% of all images",
                elsewhere.sum(),
                len(kept),
                data.duplicate_max_cluster,
                data.duplicate_max_groups,
                100 * largest_share,
            )
        kept, groups = kept[~elsewhere], groups[~elsewhere]
    return kept, groups, found, joined


@dataclass(frozen=True)
class _Rows:
    """The light columns of all raw rows, in raw order."""

    ids: list[str]
    sources: list[str]
    given: list[str | None]
    labels: NDArray[np.int64]  # -1 for quarantined rows
    latitude: NDArray[np.float64]  # NaN where unknown
    longitude: NDArray[np.float64]
    described: NDArray[np.bool_]  # there is a scene description
    reasons: list[str | None]
    part_sizes: list[int]


def _read_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Stream columns of an Arrow file; memory-mapped, so the other columns are not read."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number).select(columns)


def _read_rows(parts: list[Part]) -> tuple[_Rows, NDArray[np.uint8]]:
    """Collect the light columns of all parts, and thumbnails [N, 16, 16]: zeros for quarantined rows."""
    names = ["id", "source", "group", "label", "latitude", "longitude", "reason"]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    blank = bytes(duplicates.THUMBNAIL_SIDE**2)
    described, thumbnails, sizes = bytearray(), bytearray(), []
    for part in parts:
        before = len(columns["id"])
        for batch in _read_batches(part.path, [*names, "scene_description", "thumbnail"]):
            for name, values in columns.items():
                values.extend(batch.column(name).to_pylist())
            texts = batch.column("scene_description").to_pylist()
            described += bytes(bool((text or "").strip()) for text in texts)
            thumbnails += b"".join(v or blank for v in batch.column("thumbnail").to_pylist())
        sizes.append(len(columns["id"]) - before)
    side = duplicates.THUMBNAIL_SIDE
    rows = _Rows(
        ids=columns["id"],
        sources=[sys.intern(source) for source in columns["source"]],  # a few, many times each
        given=columns["group"],
        labels=np.array([-1 if v is None else v for v in columns["label"]], np.int64),
        latitude=np.array(columns["latitude"], np.float64),
        longitude=np.array(columns["longitude"], np.float64),
        described=np.frombuffer(described, np.bool_),
        reasons=columns["reason"],
        part_sizes=sizes,
    )
    return rows, np.frombuffer(thumbnails, np.uint8).reshape(-1, side, side)


def _count_unread_positions(parts: list[Part]) -> int:
    """Rows whose source gave a position that was not understood."""
    return sum(
        unread_value(extra, UNREAD_POSITION) is not None
        for part in parts
        for batch in _read_batches(part.path, ["latitude", "extra"])
        for extra in batch.column("extra").filter(batch.column("latitude").is_null()).to_pylist()
    )


def _check_ids(ids: list[str]) -> None:
    if len(set(ids)) < len(ids):
        name, times = Counter(ids).most_common(1)[0]
        raise UserError(f'data/raw: the id "{name}" occurs {times} times; ids must be unique')


def _quarantine_conflicts(rows: _Rows) -> None:
    """Mark rows whose label and description disagree, in sources that have descriptions.

    The validator's cache of real images skips them too: label 0 with a description, 1 without.
    """
    with_descriptions = {
        source for source, has in zip(rows.sources, rows.described, strict=True) if has
    }
    for row, reason in enumerate(rows.reasons):
        conflict = bool(rows.labels[row]) != bool(rows.described[row])
        if reason is None and conflict and rows.sources[row] in with_descriptions:
            rows.reasons[row] = "label and description in conflict"


def _write_quarantine(path: Path, rows: _Rows, parts: list[Part]) -> None:
    """Write one line a quarantined row; only the header if there is none."""
    bad = [row for row, reason in enumerate(rows.reasons) if reason]
    firsts = np.cumsum([0, *rows.part_sizes])  # row of each part's first
    of_part = (np.searchsorted(firsts, bad, side="right") - 1).tolist()
    places = [
        (parts[part].shard.name, parts[part].first_row + row - int(firsts[part]))
        for part, row in zip(of_part, bad, strict=True)
    ]
    columns: dict[str, list[Any]] = {
        "id": [rows.ids[row] for row in bad],
        "source": [rows.sources[row] for row in bad],
        "reason": [rows.reasons[row] for row in bad],
        "file": [file for file, _ in places],
        "row": [row for _, row in places],
    }
    write_csv_atomic(path, columns)


def _check_quarantine(rows: _Rows, limit: float, path: Path) -> None:
    """Refuse to go on with too many unusable rows, or with none that is usable."""
    reasons = Counter(reason for reason in rows.reasons if reason)
    bad, total = reasons.total(), len(rows.ids)
    if not total:
        raise UserError("the raw shards hold no rows; check data.sources and rerun `ingest`")
    if bad > limit * total or bad == total:
        reason, times = reasons.most_common(1)[0]
        raise UserError(
            f"{bad} of {total} rows ({bad / total:.1%}) cannot be used, allowed are {limit:.1%} "
            f'(data.max_bad_fraction); most often "{reason}" ({times}); all are in {path}'
        )


def _write_splits(
    parts: list[Part],
    split_paths: Mapping[str, Path],
    kept: NDArray[np.int64],
    groups: NDArray[np.object_],
    result: SplitResult,
    progress: Progress,
) -> None:
    """Stream the kept rows of all parts into the split files, in raw order."""

    def batches(split: str) -> Iterator[pa.RecordBatch]:
        """Rows of a split with their final group and fusion flag, as they come."""
        first = 0
        for part in progress(parts, len(parts), f"writing {split}"):
            for batch in _read_batches(part.path, PART_SCHEMA.names):
                # Positions among the kept rows of this batch's rows.
                low, high = np.searchsorted(kept, [first, first + batch.num_rows])
                wanted = low + np.flatnonzero(result.split[low:high] == split)
                rows = batch.take(pa.array(kept[wanted] - first))
                first += batch.num_rows
                final = {
                    "group": pa.array(groups[wanted], pa.string()),
                    "fusion": pa.array(result.fusion[wanted]),
                }
                columns = [
                    final[name] if name in final else rows.column(name)
                    for name in SPLIT_SCHEMA.names
                ]
                yield pa.record_batch(columns, schema=SPLIT_SCHEMA)

    def write(split: str, path: Path) -> None:
        with pa.ipc.new_file(path, SPLIT_SCHEMA) as writer:
            held, n_held = [], 0
            for batch in batches(split):
                held.append(batch)
                n_held += batch.num_rows
                if n_held >= _WRITE_ROWS:
                    table = pa.Table.from_batches(held).combine_chunks()
                    writer.write_table(table[:_WRITE_ROWS])
                    held, n_held = table[_WRITE_ROWS:].to_batches(), n_held - _WRITE_ROWS
            if n_held:
                writer.write_table(pa.Table.from_batches(held).combine_chunks())

    for split, path in split_paths.items():
        write_atomic(path, partial(write, split))


def _write_originals(
    parts: list[Part], path: Path, val_test: Path, limit: int, seed: int, progress: Progress
) -> int:
    """Copy the files of VAL_TEST's images, at most `limit` of them drawn by `seed`; how many."""
    names = [
        name for batch in _read_batches(val_test, ["id"]) for name in batch.column("id").to_pylist()
    ]
    drawn = np.random.default_rng(seed).permutation(len(names))[:limit]
    wanted = {names[row] for row in drawn}

    def write(temporary: Path) -> None:
        with pa.ipc.new_file(temporary, ORIGINALS_SCHEMA) as writer:
            for part in progress(parts if wanted else [], len(parts), "keeping originals"):
                for batch in read_raw(part, ["id", "image"]):
                    images = batch.column("image").flatten()[0]
                    # One at a time: photographs are large, and raw row groups must not show.
                    for row, name in enumerate(batch.column("id").to_pylist()):
                        if name in wanted:
                            one = {"id": [name], "image": [images[row].as_py()]}
                            writer.write_batch(pa.record_batch(one, schema=ORIGINALS_SCHEMA))

    write_atomic(path, write)
    return len(wanted)


# ------------------------------------------------------------------- report


def _report_files(split_paths: Mapping[str, Path], groups: GroupReport) -> dict[str, Any]:
    """Count what the written files hold.

    Counts of single groups are listed for at most 100 groups: the report is tracked by Git.
    """
    names = ["source", "group", "label", "fusion"]
    columns: dict[str, list[Any]] = {name: [] for name in [*names, "split"]}
    for split in SPLITS:
        for batch in _read_batches(split_paths[split], names):
            for name in names:
                columns[name].extend(batch.column(name).to_pylist())
            columns["split"].extend([split] * batch.num_rows)
    label, fusion = np.array(columns["label"]), np.array(columns["fusion"])
    split_of, source_of = np.array(columns["split"]), np.array(columns["source"])
    group_names, group_of = np.unique(np.array(columns["group"]), return_inverse=True)

    def count(mask: NDArray[np.bool_]) -> dict[str, int]:
        return {"images": int(mask.sum()), "positives": int(label[mask].sum())}

    def count_with_groups(mask: NDArray[np.bool_]) -> dict[str, int]:
        return {**count(mask), "groups": len(np.unique(group_of[mask]))}

    images = np.bincount(group_of)
    positives = np.bincount(group_of, weights=label).astype(np.int64)
    splits: dict[str, Any] = {}
    for split in SPLITS:
        inside = split_of == split
        counts: dict[str, Any] = count_with_groups(inside)
        here = np.unique(group_of[inside])
        counts["positive_share"] = counts["positives"] / counts["images"]
        counts["groups_without_roadwork"] = int((positives[here] == 0).sum())
        counts["groups_of_roadwork_alone"] = int((positives[here] == images[here]).sum())
        splits[split] = counts
    # TRAIN's two parts may not share a group either.
    place = np.char.add(split_of, np.where(fusion, "/fusion", ""))
    crossings = len(set(zip(group_of.tolist(), place.tolist(), strict=True))) - len(group_names)
    report = {
        "splits": splits,
        "fusion": count_with_groups(fusion),
        "sources": {str(name): count(source_of == name) for name in np.unique(source_of)},
        "groups": {
            "total": len(group_names),
            "one_class": int(((positives == 0) | (positives == images)).sum()),
            "smallest_images": int(images.min()),
            "median_images": float(np.median(images)),
            "largest_images": int(images.max()),
            **vars(groups),
        },
        "shared_groups": crossings,
    }
    if len(group_names) <= _MAX_LISTED_GROUPS:
        report["group_counts"] = {
            str(name): {"images": int(n), "positives": int(k)}
            for name, n, k in zip(group_names, images, positives, strict=True)
        }
    return report
