"""How often `leakage` alarms where nothing leaked, and how often it finds a copy, by simulation."""

from __future__ import annotations

import numpy as np

from streetvision.review.leakage import find_leakage
from tests.benchmarks.runner import Table
from tests.review.pictures import scenes

REPEATS = 200
WITHIN = (0.02, 0.1, 0.3, 0.7, 1.5)
# Groups of three splits, images of a group, whether all groups have as many.
DATA = (((40, 15, 15), 8, True), ((40, 15, 15), 8, False), ((40, 15, 15), 30, True))
COPY = 0.02  # noise on a planted copy, of the deviation between places


def leakage() -> list[Table]:
    """Alarms without a leak, of which 5 % are meant, and copies found, by how alike a drive's images are."""
    rows = []
    for groups, size, equal in DATA:
        for within in WITHIN:
            alarms = found = 0
            rng = np.random.default_rng([size, equal, round(100 * within)])
            for repeat in range(REPEATS):
                looked = [
                    scenes(rng, name, n, size, within, equal=equal)
                    for name, n in zip("abc", groups, strict=True)
                ]
                alarms += find_leakage(looked, 6, 0.04).alarm
                if repeat % 4 == 0:
                    noise = COPY * rng.normal(size=looked[0].features.shape[1])
                    looked[1].features[3] = looked[0].features[5] + noise
                    leaks = find_leakage(looked, 6, 0.04).leaks
                    found += ((0, 5), (1, 3)) in {(pair.first, pair.second) for pair in leaks}
            rows.append(
                [
                    f"{groups}", f"{size}{'' if equal else ', geometric'}", f"{within}",
                    f"{alarms / REPEATS:.1%}", f"{found / (REPEATS // 4):.0%}",
                ]
            )  # fmt: skip
    return [
        Table(
            f"`leakage` on exchangeable splits ({REPEATS} each), and with one copy in (50 each)",
            [
                "groups",
                "images each",
                "deviation within a group",
                "alarms (5 % meant)",
                "copy found",
            ],
            rows,
        )
    ]
