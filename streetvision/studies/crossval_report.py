"""The report of a cross-validation: its folds pooled and apart, and the tables of what they held out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streetvision.core.escaping import markdown, shortened
from streetvision.core.params import Params
from streetvision.core.schema import CONDITIONS
from streetvision.data.served_images import served_versions
from streetvision.data.store import Split

# What is compared: on images as they are, the same distorted as the validator does; the baseline as they are.
MODELS = ("pipeline", "pipeline_challenge", "baseline")
PREDICTIONS, LOGITS = "predictions.csv", "logits.csv"


def summarise(
    split: Split, units: NDArray[np.object_], folds: list[dict[str, Any]], params: Params
) -> tuple[dict[str, Any], dict[str, dict[str, list[Any]]]]:
    """Pool the folds: report (scalar leaves) and the columns of the two tables, by file name."""
    from streetvision.stats.bootstrap import group_intervals, paired_group_interval
    from streetvision.stats.metrics import all_metrics
    from streetvision.stats.paired import same_mcc_p

    row_of = {name: row for row, name in enumerate(split.ids.tolist())}
    parts = [np.array([row_of[name] for name in fold["ids"]]) for fold in folds]
    repeats = served_versions(params.subnet, params.embed.served_repeats)
    rows = np.concatenate(parts)
    # Of each model the rows of each fold's images, and its probabilities.
    seen = {
        name: [np.repeat(p, repeats if name == MODELS[1] else 1) for p in parts] for name in MODELS
    }
    said = {
        "pipeline": [np.array(fold["conditions"]["clean"]["pipeline"]) for fold in folds],
        "pipeline_challenge": [
            np.array(fold["conditions"]["served"]["pipeline"]) for fold in folds
        ],
        "baseline": [np.array(fold["baseline"]) for fold in folds],
    }
    report: dict[str, Any] = {
        "images": len(rows),
        "groups": len(set(units[rows])),
        "images_always_in_train": len(split) - len(rows),
        "seed": params.seed,
        "modes": {m: sum(fold["mode"] == m for fold in folds) for m in {f["mode"] for f in folds}},
        "median_epochs": float(np.median([fold["epochs"] for fold in folds])),
    }
    n_resamples = params.evaluate.n_resamples
    by_fold: dict[str, Any] = {}
    for number, (fold, part) in enumerate(zip(folds, parts, strict=True)):
        names = fold["groups_held_out"]
        by_fold[names[0] if len(names) == 1 else f"fold {number + 1}"] = {
            "images": len(part),
            "groups": len(names),
            "positives": int(split.labels[part].sum()),
            "mode": fold["mode"],
            **{
                name: all_metrics(split.labels[seen[name][number]], said[name][number])["mcc"]
                for name in MODELS
            },
        }
    for name in MODELS:
        at, values = np.concatenate(seen[name]), np.concatenate(said[name])
        sample = (split.labels[at], values, units[at])
        decided = group_intervals(
            *sample, n_resamples=n_resamples, seed=params.seed,
            metrics=("mcc", "accuracy", "roc_auc", "fnr", "fpr"),
        )  # fmt: skip
        # Probabilities are meant for the served prior, so calibration is measured there.
        calibrated = group_intervals(
            *sample, params.decision.served_prior, n_resamples, seed=params.seed,
            metrics=("ece", "ece_debiased", "log_loss"),
        )  # fmt: skip
        mcc = decided["mcc"]
        report[name] = {key: found.value for key, found in (decided | calibrated).items()}
        report[name] |= {
            "mcc_low": mcc.low, "mcc_high": mcc.high, "interval_method": mcc.method,
            "effective_groups": mcc.effective_groups,
        }  # fmt: skip
        each = [row[name] for row in by_fold.values()]
        report[name] |= {"mcc_mean": float(np.mean(each)), "mcc_std": float(np.std(each, ddof=1))}
    labels, groups = split.labels[rows], units[rows]
    pipeline, baseline = (np.concatenate(said[name]) for name in ("pipeline", "baseline"))
    gain = paired_group_interval(
        labels, baseline, pipeline, groups, n_resamples=n_resamples, seed=params.seed
    )
    p = same_mcc_p(labels, baseline, pipeline, groups, float(labels.mean()), seed=params.seed)
    report["gain"] = {
        "mcc": gain.value, "low": gain.low, "high": gain.high, "same_mcc_p": p,
    }  # fmt: skip
    report["by_fold"] = by_fold
    predictions = {
        "id": split.ids[rows].tolist(), "group": groups.tolist(), "label": labels.tolist(),
        "pipeline": pipeline.tolist(), "baseline": baseline.tolist(),
    }  # fmt: skip
    return report, {PREDICTIONS: predictions, LOGITS: _logits(split, folds, seen)}


def _logits(
    split: Split, folds: list[dict[str, Any]], seen: dict[str, list[NDArray[np.int64]]]
) -> dict[str, list[Any]]:
    """Columns of the raw logits of what was held out, under both conditions."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("id", "unit", "label", "condition", "single", "fused")
    }
    for number, fold in enumerate(folds):
        for condition, model in zip(CONDITIONS, MODELS, strict=False):
            found, at = fold["conditions"][condition], seen[model][number]
            columns["id"] += split.ids[at].tolist()
            columns["unit"] += found["units"]
            columns["label"] += split.labels[at].tolist()
            columns["condition"] += [condition] * len(at)
            columns["single"] += found["single"]
            columns["fused"] += found["fused"]
    return columns


def render(report: dict[str, Any]) -> str:
    """The report as a Markdown table and a few sentences."""
    lines = [
        "| held out | images | positives | MCC, pipeline | MCC, distorted | MCC, baseline |",
        "|---|---|---|---|---|---|",
    ]
    for part, row in report["by_fold"].items():
        name = markdown(shortened(part))
        groups = "" if row["groups"] == 1 else f" ({row['groups']} groups)"
        cells = " | ".join(f"{row[model]:.3f}" for model in MODELS)
        lines.append(f"| {name}{groups} | {row['images']} | {row['positives']} | {cells} |")
    means = " | ".join(f"{report[n]['mcc_mean']:.3f} ± {report[n]['mcc_std']:.3f}" for n in MODELS)
    lines.append(f"| mean ± standard deviation | | | {means} |")
    pooled = " | ".join(f"**{report[n]['mcc']:.3f} [{_ends(report[n], 'mcc_')}]**" for n in MODELS)
    lines.append(f"| **pooled** | {report['images']} | | {pooled} |")
    gain, auc = report["gain"], [report[name]["roc_auc"] for name in ("pipeline", "baseline")]
    modes = ", ".join(f"{mode} {count}" for mode, count in sorted(report["modes"].items()))
    text = (
        f"Paired over {report['groups']} groups, which tell as much as "
        f"{report['pipeline']['effective_groups']:.1f} of equal size, the pipeline gains "
        f"{gain['mcc']:+.3f} MCC [{_ends(gain, '')}] (same MCC: p = {gain['same_mcc_p']:.3f}); "
        f"ROC-AUC {auc[0]:.3f} against {auc[1]:.3f}. Baseline: balanced logistic regression on "
        f"frozen global-view features of the same backbone, same folds. Fusions chosen: {modes}; "
        f"median of the chosen epochs {report['median_epochs']:g}."
    )
    lines += ["", text]
    return "\n".join(lines)


def _ends(interval: dict[str, Any], prefix: str) -> str:
    low, high = interval[f"{prefix}low"], interval[f"{prefix}high"]
    return "no interval" if low is None else f"{low:.3f}, {high:.3f}"
