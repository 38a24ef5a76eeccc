"""What `leakage` shows: a table, a CSV of pairs and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streetvision.core.artifacts import write_csv_atomic
from streetvision.core.escaping import caption, shortened, terminal
from streetvision.data.store import Split
from streetvision.plots.pictures import plot_mistakes
from streetvision.review.images import groups_known
from streetvision.review.leakage import MAX_EXPECTED, MIN_BASELINE, Floats, Leakage

LISTED = 1000  # nearest pairs in the CSV, beside all leaks


def write_pairs(found: Leakage, path: Path) -> Path:
    """Write all leaks and the nearest other pairs as CSV, the most suspicious first."""
    pairs = found.pairs[: max(LISTED, len(found.leaks))]
    columns: dict[str, list[Any]] = {"rank": list(range(1, len(pairs) + 1))}
    for side in ("first", "second"):
        places = [(found.splits[s], row) for s, row in (getattr(pair, side) for pair in pairs)]
        columns[f"{side}_split"] = [split.name for split, _ in places]
        columns[f"{side}_id"] = [split.ids[row] for split, row in places]
        columns[f"{side}_group"] = [split.groups[row] for split, row in places]
    for name in ("similarity", "ratio", "expected", "hash_bits", "pixel_error"):
        columns[name] = [getattr(pair, name) for pair in pairs]
    columns["duplicate"] = [int(pair.duplicate) for pair in pairs]
    columns["leak"] = [int(pair.leak) for pair in pairs]
    return write_csv_atomic(path, columns)


def contact_sheet(found: Leakage, images: Sequence[Split], count: int) -> bytes:
    """Draw the `count` most suspicious pairs side by side, two pairs to a row."""
    pictures, captions = [], []
    for rank, pair in enumerate(found.pairs[:count], 1):
        for split, row in (pair.first, pair.second):
            pictures.append(images[split].image(row))
            seen = found.splits[split]
            captions.append(
                f"{rank}{' LEAK' if pair.leak else ''}: {seen.name}\n{caption(str(seen.groups[row]), 26)}\n"
                f"ratio {pair.ratio:.2f}, {pair.hash_bits} bits"
            )
    return plot_mistakes(pictures, captions, "The nearest pairs across splits")


def describe(found: Leakage) -> list[str]:
    """What was found, in lines; small ratios are near: the nearest neighbour's distance by the next group's."""
    names = [terminal(shortened(split.name)) for split in found.splits]
    lines = [
        f"{'smallest ratio of each group':36}"
        + "".join(f"{name:>12}" for name in ("median", "1 %", "smallest", "leaks", "duplicates"))
    ]
    for a, baseline in found.baselines.items():
        if len(baseline):
            lines.append(_row(f"{names[a]}: between its groups", baseline))
        for (first, b), ratios in found.ratios.items():
            if first == a:
                mine = [pair for pair in found.pairs if (pair.first[0], pair.second[0]) == (a, b)]
                counts = sum(pair.leak for pair in mine), sum(pair.duplicate for pair in mine)
                lines.append(_row(f"{names[b]} in {names[a]}", ratios, *counts))
    for (a, b), groups in found.shared.items():
        if groups:
            lines.append(
                f"{len(groups)} groups are in {names[a]} and in {names[b]}: "
                + ", ".join(terminal(shortened(name)) for name in groups[:3])
                + (", …" if len(groups) > 3 else "")
            )
    unsure = [names[a] for a, each in found.baselines.items() if len(each) < MIN_BASELINE]
    if unsure:
        lines.append(
            f"Fewer than {MIN_BASELINE} groups in {', '.join(unsure)}, too few to know what chance brings: "
            "there only near-duplicates by `prepare`'s rule count."
        )
    alone = [split.name for split in found.splits if not groups_known(split.groups)]
    if alone:
        lines.append(
            f"No groups are known in {', '.join(alone)}: frames of one drive count as unrelated there, "
            "and a drive that is in two splits may look like chance."
        )
    return [*lines, _verdict(found)]


def _row(title: str, ratios: Floats, *counts: int) -> str:
    cells = [f"{value:12.3f}" for value in np.quantile(ratios, [0.5, 0.01, 0], method="nearest")]
    return f"{title:36}" + "".join(cells + [f"{count:12}" for count in counts])


def _verdict(found: Leakage) -> str:
    if leaks := len(found.leaks):
        return (
            f"LEAK: {leaks} pairs are near-duplicates, or nearer than chance brings in "
            f"{1 / MAX_EXPECTED:.0f} such reviews. Look at them; group what belongs together and "
            "run `prepare` again."
        )
    if found.alarm:
        return "LEAK: groups are in two splits."
    return "No leak found: neighbours across splits are no nearer than those in other groups of one split."
