"""`metrics/headline.json`: of all metrics the dozen by which two runs are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names in the order in which tables show them, each with its file and its place there.
HEADLINE = {
    "mcc": ("evaluation", "mcc"),
    "mcc_low": ("evaluation", "served_interval.mcc.low"),
    "mcc_high": ("evaluation", "served_interval.mcc.high"),
    "ece": ("evaluation", "ece"),
    "ece_debiased": ("evaluation", "served.ece_debiased"),
    "ece_debiased_low": ("evaluation", "served_interval.ece_debiased.low"),
    "ece_debiased_high": ("evaluation", "served_interval.ece_debiased.high"),
    "challenge_mcc": ("challenge", "mcc"),
    "reward": ("challenge", "reward.mean"),
    "reward_low": ("challenge", "reward.low"),
    "reward_high": ("challenge", "reward.high"),
    "val_select_mcc": ("train", "val_select.mcc"),
}


def headline_of(
    train: Mapping[str, Any], evaluation: Mapping[str, Any], challenge: Mapping[str, Any]
) -> dict[str, float]:
    """Take the `HEADLINE` from three metrics files; what one of them does not have is left out.

    `mcc`, `ece` and `ece_debiased` are those of VAL_TEST at the served prior, `challenge_mcc` and `reward`
    (expected, a challenge) those of VAL_TEST distorted as it is served, `low` and `high` the ends of their
    95 % intervals over groups, and `val_select_mcc` is the MCC by which `train` chose its epoch.
    """
    files = {"train": train, "evaluation": evaluation, "challenge": challenge}
    found: dict[str, float] = {}
    for name, (file, place) in HEADLINE.items():
        value: Any = files[file]
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found[name] = value
    return found


def in_words(headline: Mapping[str, float]) -> str:
    """The headline on one line, in its order, intervals in brackets."""
    parts = []
    for name, value in headline.items():
        if name.endswith(("_low", "_high")):
            continue
        ends = [headline.get(f"{name}_{end}") for end in ("low", "high")]
        between = "" if None in ends else f" ({ends[0]:.4f} to {ends[1]:.4f})"
        parts.append(f"{name} {value:.4f}{between}")
    return ", ".join(parts) or "no metric exists"
