"""The validators' profiles for people and for programs."""

from __future__ import annotations

from typing import Any

from streetvision.subnet.payment import REWARDS
from streetvision.subnet.profiles import HALT, HALT_COMMIT, HALTED, PROFILES, ValidatorProfile

_HEADINGS = ("validator", "from", "until", "commits", "size", "levels", "status", "what is sent")


def as_table() -> str:
    """A line for each profile, the newest first, and that the subnet is halted."""
    rows = [_HEADINGS, *(_row(each) for each in PROFILES.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", HALT])


def _row(profile: ValidatorProfile) -> tuple[str, ...]:
    shares = " ".join(f"{share:.0%}" for share in profile.level_shares)
    return (
        profile.name, str(profile.since), str(profile.until), " ".join(profile.commits),
        "its own" if profile.side is None else f"{profile.side} x {profile.side}",
        "one" if len(profile.levels) == 1 else f"{len(profile.levels)} ({shares})",
        profile.status, profile.sent,
    )  # fmt: skip


def as_json() -> dict[str, Any]:
    """All data of the profiles, and the halt."""
    return {
        "halted": {"date": str(HALTED), "commit": HALT_COMMIT, "note": HALT},
        "profiles": [
            {
                "name": each.name,
                "status": each.status,
                "since": str(each.since),
                "until": str(each.until),
                "commits": list(each.commits),
                "sent": each.sent,
                "side_px": each.side,
                "level_shares": list(each.level_shares),
                "sources": dict(each.sources),
                "positive_share": each.positive_share,
                "jpeg": {"quality": each.jpeg_quality, "subsampling": each.jpeg_subsampling},
                "deadline_seconds": each.deadline,
                "reward": {
                    "name": REWARDS[each.reward].name,
                    "formula": REWARDS[each.reward].formula,
                    "window": REWARDS[each.reward].window,
                },
            }
            for each in PROFILES.values()
        ],
    }
