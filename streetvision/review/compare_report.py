"""A comparison in words: a text table, Markdown, JSON and CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streetvision.core.escaping import markdown, shortened, terminal
from streetvision.evaluation.report import safe_key
from streetvision.review.compare import Comparison
from streetvision.review.revisions import Review
from streetvision.stats.bootstrap import BOOTSTRAP, JACKKNIFE, Interval

NAMES = {
    "mcc": "MCC", "accuracy": "accuracy", "fnr": "missed (FNR)", "fpr": "false alarms (FPR)", "ece": "ECE",
    "ece_debiased": "debiased ECE", "log_loss": "log loss", "reward": "reward, clean images",
}  # fmt: skip
_METHODS = {
    BOOTSTRAP: "percentile bootstrap over groups (10,000 resamples, expanded by Student's t)",
    JACKKNIFE: "delete-one-group jackknife with Student's t, as there are fewer than 60 effective groups",
}
Rows = Sequence[Sequence[str]]


def text_report(found: Review) -> str:
    """The comparison for a terminal."""
    return _report(found, text_table, lambda title: title, "", terminal)


def markdown_report(found: Review) -> str:
    """The comparison in Markdown, as for a pull request."""
    return _report(found, markdown_table, lambda title: f"### {title}", "- ", markdown)


def json_report(found: Review) -> dict[str, Any]:
    """The comparison as nested dictionaries of finite scalars; what does not exist is left out."""
    comparison = found.comparison
    matching = comparison.matching
    tests: dict[str, Any] = {
        "same_mcc_p": comparison.same_mcc_p, "mcnemar_iid_p": comparison.mcnemar_p
    }  # fmt: skip
    if comparison.fisher_z is not None:
        tests["fisher_z_iid_natural_prior"] = _interval(comparison.fisher_z)
    return {
        "base": str(found.base),
        "head": str(found.head),
        "served_prior": comparison.served_prior,
        "test_set": {
            "base_images": matching.n_base, "head_images": matching.n_head,
            "common_images": matching.n_common, "label_conflicts": len(matching.conflicts),
            "other_pictures": len(matching.others),
            "compared_images": comparison.n, "positives": comparison.n_positive,
            "groups": comparison.n_groups, "effective_groups": comparison.effective_groups,
        },
        "notes": {f"note_{number}": note for number, note in enumerate(found.notes, 1)},
        "metrics": {
            name: _present(
                base=_interval(each.base), head=_interval(each.head), delta=_interval(each.delta),
                standard_error=each.standard_error, groups_needed=each.groups_needed,
                images_needed=each.images_needed, verdict=each.verdict,
            )
            for name, each in comparison.differences.items()
        },
        "tests": tests,
        "slices": {
            f"{each.name}.{safe_key(each.value)}": _present(
                images=each.n, groups=each.n_groups, base=each.base, head=each.head,
                delta=None if each.delta is None else _interval(each.delta),
                same_mcc_p=each.p_value, same_mcc_p_holm=each.p_holm,
            )
            for each in comparison.slices
        },
        "changed": {
            each.id: {
                "group": each.group, "label": each.label, "base": each.base, "head": each.head,
                "right": each.right,
            }
            for each in comparison.changes
        },
    }  # fmt: skip


def changes_table(comparison: Comparison) -> dict[str, list[Any]]:
    """Columns of `changed.csv`: every image whose decision changed."""
    names = ("id", "group", "label", "base", "head", "right")
    return {name: [getattr(each, name) for each in comparison.changes] for name in names}


def metric_rows(comparison: Comparison) -> list[list[str]]:
    """One row a metric: name, base, head, difference, interval, verdict."""
    return [
        [
            NAMES[name], f"{each.base.value:.4f}", f"{each.head.value:.4f}", f"{each.delta.value:+.4f}",
            _bounds(each.delta), each.verdict,
        ]
        for name, each in comparison.differences.items()
    ]  # fmt: skip


def slice_rows(comparison: Comparison, escape: Callable[[str], str]) -> list[list[str]]:
    """One row a slice: name, images and groups, MCC of both, difference, interval, p and Holm's p."""
    return [
        [
            escape(shortened(f"{each.name} {each.value}")), f"{each.n:,} in {each.n_groups}", *(
                "" if value is None else f"{value:.3f}" for value in (each.base, each.head)
            ),
            "" if each.delta is None else f"{each.delta.value:+.3f}",
            "" if each.delta is None else _bounds(each.delta, 3),
            _p(each.p_value), _p(each.p_holm),
        ]
        for each in comparison.slices
    ]  # fmt: skip


def tests_text(found: Review) -> list[str]:
    """The tests and the size of a test that would tell, a sentence each."""
    comparison = found.comparison
    won = sum(each.right == "head" for each in comparison.changes)
    lost = len(comparison.changes) - won
    lines = [
        f"Decisions changed: {won + lost}; {won} are right now, {lost} are wrong now.",
        (
            "Same MCC? Swaps of whole groups and the jackknife, of both the larger: "
            f"{_p_text(comparison.same_mcc_p)}."
        ),
        (
            "i.i.d., too sure where a group's images are alike: McNemar's exact test on decisions "
            f"{_p_text(comparison.mcnemar_p)}."
        ),
    ]
    if comparison.fisher_z is not None:
        lines.append(
            f"i.i.d., and made for normal variables, so too narrow for decisions: Fisher z, MCC at the natural "
            f"prior {comparison.fisher_z.value:+.4f} {_bounds(comparison.fisher_z)}."
        )
    mcc = comparison.differences["mcc"]
    if mcc.groups_needed is not None and mcc.images_needed is not None:
        lines.append(
            f"To see an MCC difference of {mcc.delta.value:+.4f} with 80 % power: about "
            f"{mcc.images_needed:,} test images in {mcc.groups_needed:,} groups; here are "
            f"{comparison.n:,} in {comparison.n_groups:,}."
        )
    return lines


def _report(
    found: Review,
    table: Callable[[Sequence[str], Rows], str],
    heading: Callable[[str], str],
    bullet: str,
    escape: Callable[[str], str],
) -> str:
    comparison = found.comparison
    mcc = comparison.differences["mcc"].delta
    parts = [
        heading(escape(f"{found.head} against {found.base}")),
        (
            f"{comparison.n:,} test images in {comparison.n_groups:,} groups, which tell as much as "
            f"{comparison.effective_groups:.1f} of equal size; {comparison.n_positive:,} with roadwork; "
            f"metrics as if {100 * comparison.served_prior:g} % of the served images had it."
        ),
        *(f"Note: {escape(note)}." for note in found.notes),
        table(
            ["metric", "base", "head", "difference", "95 % interval", "verdict"],
            metric_rows(comparison),
        ),
        (
            f"Intervals: {_METHODS.get(mcc.method, mcc.method)}. ECE has none: it exceeds the model's by the "
            "noise of its bins."
        ),
        "\n".join(bullet + sentence for sentence in tests_text(found)),
    ]
    if comparison.slices:
        parts += [
            heading(
                "MCC by slice, p by swaps and jackknife of groups, corrected for all slices (Holm)"
            ),
            table(
                [
                    "slice",
                    "images, groups",
                    "base",
                    "head",
                    "difference",
                    "95 % interval",
                    "p",
                    "Holm",
                ],
                slice_rows(comparison, escape),
            ),
        ]
    return "\n\n".join(parts) + "\n"


def text_table(header: Sequence[str], rows: Rows) -> str:
    """Columns side by side: words of the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if place == 0 or place == len(widths) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """The same in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _bounds(interval: Interval, digits: int = 4) -> str:
    if interval.low is None or interval.high is None:
        return "none"
    return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _p_text(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _interval(interval: Interval) -> dict[str, Any]:
    return _present(
        value=interval.value, low=interval.low, high=interval.high, method=interval.method
    )


def _present(**entries: Any) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}
