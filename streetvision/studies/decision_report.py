"""The tables of fusion and calibration; every number and word comes from the lines of the finished runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import library_versions, write_bytes_atomic
from streetvision.core.schema import CONDITIONS
from streetvision.fusion.fusion import MODES
from streetvision.studies.decision import SPLIT
from streetvision.studies.decision_held_out import REFERENCE_ALL, REFERENCES, SINGLE_ALL
from streetvision.studies.decision_runs import AUTO, DEFAULT, STEPS, Run, as_dict
from streetvision.studies.fresh import ECE_TARGET
from streetvision.studies.report import Spread

Line = Mapping[str, Any]
Finished = Sequence[tuple[Run, Line]]
N_RESAMPLES = 2000
NAMES = {"synthetic": "Rendered scenes", "photos": "Photographs"}
METRIC_NAMES = {
    "mcc": "MCC",
    "log_loss": "log loss",
    "ece": "ECE",
    "ece_debiased": "debiased ECE",
}
STEP_NAMES = {
    "single": "single view",
    "fused": "fused",
    "calibrated": "calibrated",
    "deployed": "**deployed**",
    "calibrated_auto": "calibrated, `auto`",
    "deployed_auto": "deployed, `auto`",
}
CONDITION_NAMES = {
    "clean": "Images as they are",
    "served": "Images as the validator sends them, levels mixed",
}

_INTRODUCTION = """\
Written by `{command}` from one line a run (the `.jsonl` beside this file); no number here is typed by hand. \
A run takes `prepare`'s split with another seed, trains, embeds with views, chooses fusion on VAL_SELECT and \
fits the policy on VAL_CALIB. VAL_TEST, with every log-odds moved from VAL_CALIB's prior to the served one: \
*single view* is the uncalibrated probability of \
the global view, decided at 0.5; *fused* the same of the fused logit; *calibrated* and *deployed* by the \
default calibrator, threshold at 0.5 and moved where its interval excludes 0.5; the last two rows with the \
calibrator of the lowest out-of-fold log loss. ± is the standard deviation over the seeds; intervals, 95 %, \
count groups. ECE has 15 bins; its floor is what a perfectly calibrated model of that size would show, 95 % of \
them less than the bound. All parts, from TRAIN's fusion part to VAL_TEST, are under one condition, as they \
are or distorted: fusion and policy are fitted for what is served. {machine}."""
_HELD_OUT = """\
The groups with both classes are held out in {folds} parts, in turn. The backbone is frozen, as it was \
pretrained: no image of these data moved it. A quarter of all other groups is VAL_SELECT, each of the \
{quarters} in turn. The head is balanced logistic regression on the global view of the rest, which fusion is \
fitted on, too, with logits of heads that did not see the group. Pooled decisions on {images} images of \
{groups} groups, not distorted; ± over the quarters; Δ with the decisions of all of them together. Rules \
without training have the bias and scale that they would have learnt, the single view is as it is. `auto` \
chose {chosen}. *Reference*: balanced logistic regression on the global view's features beside the mean of \
the tiles', fitted on the same images as the head. Only what **auto** gains was chosen without a look at these \
groups; \
Holm's p corrects the fusions' for being so many. *All*: the head and the reference fitted on all other \
groups, VAL_SELECT's too; the gain of the one over the other is {gain_all}."""


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, the first row its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def interval(found: Mapping[str, float | None], sign: str = "") -> str:
    """`0.812 [0.790, 0.833]`."""
    text = f"{found['value']:{sign}.3f}"
    if found["low"] is None or found["high"] is None:
        return f"{text} [none]"
    return f"{text} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def steps_table(lines: Sequence[Line], condition: str) -> list[str]:
    """Mean and standard deviation over the runs of each step."""
    rows = [["step", *METRIC_NAMES.values(), "ECE's floor", "its 95 % bound"]]
    for step in STEPS:
        found = [line["conditions"][condition]["steps"][step] for line in lines]
        cells = [Spread.of([each[name]["value"] for each in found]).text() for name in METRIC_NAMES]
        floors = [
            Spread.of([each[name] for each in found]).text()
            for name in ("noise_floor", "noise_floor_upper")
        ]
        rows.append([STEP_NAMES[step], *cells, *floors])
    return table(rows)


def seeds_table(lines: Sequence[Line], condition: str) -> list[str]:
    """Each run's steps with intervals."""
    rows = [["seed", "step", *METRIC_NAMES.values()]]
    for line in lines:
        for step in STEPS:
            found = line["conditions"][condition]["steps"][step]
            cells = [interval(found[name]) for name in METRIC_NAMES]
            rows.append([str(line["number"]), STEP_NAMES[step], *cells])
    return table(rows)


def fusion_table(lines: Sequence[Line], condition: str) -> list[str]:
    """What VAL_SELECT says of fusion: whether it is on."""
    rows = [["seed", "chosen", "MCC", "Δ MCC", "log loss", "Δ log loss"]]
    for line in lines:
        found = line["conditions"][condition]["fusion"]
        rows.append([str(line["number"]), found["mode"], *_before_after(found)])
    return table(rows)


def calibrators_table(lines: Sequence[Line], condition: str) -> list[str]:
    """What VAL_CALIB says out of fold of the default calibrator and of `auto`."""
    rows = [["seed", "calibrator", "MCC", "Δ MCC", "log loss", "Δ log loss"]]
    for line in lines:
        found = line["conditions"][condition]
        for name in (DEFAULT, AUTO):
            kind = found["calibrator"][name]
            label = kind if name == DEFAULT else f"`auto`: {kind}"
            out_of_fold = found["out_of_fold"][name]
            cells = _before_after(out_of_fold) if out_of_fold else ["no folds", "", "", ""]
            rows.append([str(line["number"]), label, *cells])
    return table(rows)


def _before_after(found: Line) -> list[str]:
    cells = []
    for metric in ("mcc", "log_loss"):
        cells.append(f"{found['before'][metric]:.3f} → {found['after'][metric]:.3f}")
        cells.append(interval(found[f"gain_{metric}"], "+"))
    return cells


def verdict(what: str, gains: Sequence[Line]) -> str:
    """In how many runs a step lowered MCC beyond noise, and its mean gain."""
    worse = sum(gain["high"] is not None and gain["high"] < 0 for gain in gains)
    mean = Spread.of([gain["value"] for gain in gains]).text("+")
    return f"{what} lowers MCC beyond noise in {worse} of {len(gains)} runs (Δ {mean})."


def ece_verdict(lines: Sequence[Line], condition: str) -> str:
    """The deployed debiased ECE beside its target and the plain one beside its floor."""
    found = [line["conditions"][condition]["steps"]["deployed"] for line in lines]
    mean = Spread.of([each["ece_debiased"]["value"] for each in found]).text()
    below = sum(each["ece_debiased"]["value"] < ECE_TARGET for each in found)
    within = sum(each["ece"]["value"] <= each["noise_floor_upper"] for each in found)
    return (
        f"Deployed debiased ECE {mean}, below {ECE_TARGET} in {below} of {len(found)} runs; ECE is within "
        f"the noise of its floor in {within} of {len(found)}."
    )


def split_text(lines: Sequence[Line]) -> list[str]:
    """Everything about the runs of splits."""
    sizes = ", ".join(
        f"{name} {np.mean([line['images'][name] for line in lines]):,.0f} images of "
        f"{np.mean([line['groups'][name] for line in lines]):,.0f} groups"
        for name in lines[0]["images"]
    )
    text = [f"{len(lines)} seeds; mean sizes: {sizes}."]
    for condition in CONDITIONS:
        text += ["", f"### {CONDITION_NAMES[condition]}", "", *steps_table(lines, condition), ""]
        gains = [line["conditions"][condition]["fusion"]["gain_mcc"] for line in lines]
        text += ["Fusion, on VAL_SELECT:", "", *fusion_table(lines, condition), ""]
        text += [verdict("The chosen fusion", gains), ""]
        text += [ece_verdict(lines, condition), "", "Out of fold on VAL_CALIB, fused → deployed:"]
        text += ["", *calibrators_table(lines, condition), ""]
        for name, what in ((DEFAULT, "The default calibrator"), (AUTO, "`auto`")):
            found = [line["conditions"][condition]["out_of_fold"][name] for line in lines]
            text.append(verdict(what, [each["gain_mcc"] for each in found if each]))
        text += ["", "By seed:", "", *seeds_table(lines, condition)]
    return text


def held_out_text(lines: Sequence[Line], seed: int) -> list[str]:
    """Pooled decisions of the held-out groups, each mode against the single view, paired over groups."""
    from streetvision.decision.inputs import sigmoid
    from streetvision.stats.bootstrap import paired_group_interval
    from streetvision.stats.metrics import all_metrics
    from streetvision.stats.paired import holm, same_mcc_p

    quarters = sorted({line["number"] for line in lines})

    def pool(name: str, mode: str | None = None) -> NDArray[Any]:
        """Values of all quarters, [quarters, images]."""
        found = [
            [
                line[name] if mode is None else line[name][mode]
                for line in lines
                if line["number"] == k
            ]
            for k in quarters
        ]
        return np.stack([np.concatenate(parts) for parts in found])

    labels, groups = pool("labels"), pool("groups")
    single = sigmoid(pool("logits", "single"))
    rows = [["fusion", "MCC", "ROC AUC", "log loss", "Δ MCC, paired", "same MCC: p", "Holm"]]
    p_values: dict[str, float] = {}

    def gain(before: NDArray[Any], after: NDArray[Any]) -> tuple[str, float]:
        # An image counts once a quarter, and its group stays one group.
        pair = (labels.ravel(), before.ravel(), after.ravel(), groups.ravel())
        apart = as_dict(paired_group_interval(*pair, n_resamples=N_RESAMPLES, seed=seed))
        return interval(apart, "+"), same_mcc_p(*pair, float(labels.mean()), seed=seed)

    for mode in (*MODES, AUTO, *REFERENCES):
        fused = sigmoid(pool("logits", mode))
        found = [all_metrics(*each) for each in zip(labels, fused, strict=True)]
        cells = [
            Spread.of([each[name] for each in found]).text()
            for name in ("mcc", "roc_auc", "log_loss")
        ]
        gains = ["", ""]
        if mode != "single":
            text, p_values[mode] = gain(single, fused)
            gains = [text, f"{p_values[mode]:.3f}"]
        marks = (dict.fromkeys(REFERENCES, "*") | {AUTO: "**"}).get(mode, "")
        rows.append([f"{marks}{mode}{marks}", *cells, *gains, ""])
    # The modes are as many looks at the same groups; what was chosen without them is one.
    looks = [mode for mode in MODES if mode in p_values]
    adjusted = dict(zip(looks, holm([p_values[mode] for mode in looks]).tolist(), strict=True))
    for row in rows[1:]:
        row[-1] = f"{adjusted[row[0]]:.3f}" if row[0] in adjusted else ""
    gain_all, _ = gain(*(sigmoid(pool("logits", name)) for name in (SINGLE_ALL, REFERENCE_ALL)))
    names = [line["chosen"] for line in lines]
    chosen = ", ".join(f"{name} {names.count(name)} times" for name in sorted(set(names)))
    return [
        "### Groups held out in turn",
        "",
        _HELD_OUT.format(
            folds=len({line["part"] for line in lines}), images=labels.shape[1],
            groups=len(set(groups[0])), quarters=len(quarters), chosen=chosen, gain_all=gain_all,
        ),
        "",
        *table(rows),
    ]  # fmt: skip


def document(found: Mapping[str, Finished], command: str, workers: int) -> str:
    """What was done, and for each data set its tables."""
    versions = library_versions()
    machine = ", ".join(
        [platform.machine(), f"{workers} processes of one thread"]
        + [f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions]
    )
    introduction = _INTRODUCTION.format(command=command, machine=machine)
    text = ["# Single view, fused, calibrated, deployed", "", introduction]
    for data, runs in found.items():
        params = runs[0][0].params
        text += ["", f"## {NAMES[data]}", ""]
        text.append(
            f"{params.train.backbone}, input {params.train.height_px} × {params.train.width_px}, "
            f"{params.train.epochs} epochs; {params.views.grid} × {params.views.grid} tiles beside the "
            f"global view; {params.embed.served_repeats} distorted versions of each image that fits or "
            f"chooses, one of each of VAL_TEST; trained fusions are the mean of {params.cvfm.fits} networks."
        )
        codes = {line["code"] for _, line in runs}
        if len(codes) > 1:
            text.append(f"**The runs come from {len(codes)} versions of the code.**")
        text += split_text([line for run, line in runs if run.kind == SPLIT])
        held_out = [line for run, line in runs if run.kind != SPLIT]
        if held_out:
            text += ["", *held_out_text(held_out, params.seed)]
    return "\n".join(text) + "\n"


def write_evidence(found: Mapping[str, Finished], out: Path, command: str, workers: int) -> None:
    """Write the document and, beside it, the lines it is made of."""
    lines = [line for runs in found.values() for _, line in runs]
    text = "".join(f"{json.dumps(line, sort_keys=True)}\n" for line in lines)
    write_bytes_atomic(out.with_suffix(".jsonl"), text.encode())
    write_bytes_atomic(out, document(found, command, workers).encode())
