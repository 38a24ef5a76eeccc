"""What a sweep found: seeds aggregated, a winner, and how much of its lead is luck.

The largest of several noisy means is too high on average: it was chosen for being high. How much is
estimated by a parametric bootstrap of the maximum (Efron & Tibshirani 1993, ch. 10): means are drawn
again with the noise that the seeds show around centres that stand for the truth, the largest is taken,
and what it exceeds its own centre by is averaged. The centres are the means shrunk to their average as
James and Stein do (Efron & Morris 1975, doi 10.1080/01621459.1975.10479864): around the means as they
are, which the noise has already spread, the optimism would come out too small.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core import escaping
from streetvision.core.errors import UserError
from streetvision.core.escaping import shortened, terminal
from streetvision.review.compare_report import markdown_table, text_table
from streetvision.review.experiments import TEST_METRICS, Run

Floats = NDArray[np.float64]
CHOOSE_BY = "metrics/train.json:val_select.mcc"
REPORTED = "metrics/evaluation.json:mcc"
SPLIT_SEED = "data.split_seed"
LOWEST_IS_BEST = (
    "loss",
    "log_loss",
    "brier",
    "ece",
    "ece_equal_mass",
    "ece_debiased",
    "fnr",
    "fpr",
)
_DRAWS = 20_000
_LARGEST = 1e100  # its square is a number, too
# May not change a result (params.yaml), so they make no other configuration.
_NO_AXIS = ("hardware.", "gates.")


@dataclass(frozen=True)
class Score:
    """A metric over seeds: mean, standard deviation (None with one seed), number of seeds."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """Aggregate [n] values, at least one."""
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), sd, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.sd is None else f" ± {self.sd:.4f}")


@dataclass(frozen=True)
class Configuration:
    """Values of the varied parameters, the metric over seeds, and the experiments behind it."""

    params: dict[str, Any]
    score: Score
    values: dict[str, float]  # the metric by seed
    experiments: list[str]


@dataclass(frozen=True)
class Summary:
    """A sweep, best configuration first.

    Attributes
    ----------
    optimism : how much the best mean is better than the truth behind it, on average, for having been
        chosen; None where no configuration has two seeds
    paired : every configuration has the same seeds, so what a seed does to all of them is no noise
    noise : standard deviation of one run around its configuration; None as above
    reported : the best configuration's `REPORTED`; None unless all its experiments evaluated it
    splits : number of different splits; with several, images of one's VAL_TEST chose another, so that
        nothing is reported
    """

    metric: str
    highest: bool
    seeds: str
    configurations: list[Configuration]
    paired: bool
    noise: float | None
    optimism: float | None
    reported: Score | None
    splits: int = 1

    @property
    def best(self) -> Configuration:
        """The configuration that was chosen."""
        return self.configurations[0]

    @property
    def corrected(self) -> float | None:
        """The best mean without its optimism."""
        if self.optimism is None:
            return None
        return self.best.score.mean - (self.optimism if self.highest else -self.optimism)


def summarise(
    runs: Sequence[Run], metric: str = CHOOSE_BY, seeds: str = "seed", highest: bool | None = None
) -> Summary:
    """Aggregate runs over the parameter `seeds` and choose the best configuration.

    `highest` says which end of the metric is best; None takes the lowest for `LOWEST_IS_BEST`, except as
    a `gain`. A seed that was run twice counts once.

    Raises
    ------
    UserError
        No run; a metric that is unknown, of VAL_TEST, or the same everywhere; an unknown seed parameter.
    """
    if not runs:
        raise UserError(
            "HEAD has no finished experiments; run some, or name them: docs/experiments.md"
        )
    name = _resolve(metric, runs)
    path = name.partition(":")[0]
    if path in TEST_METRICS:
        raise UserError(
            f"{name} is measured on VAL_TEST, which may choose nothing; take a metric of another file"
        )
    unknown = [run.name for run in runs if seeds not in run.params]
    if unknown:
        raise UserError(f'{unknown[0]} has no parameter "{seeds}"; name one that is in params.yaml')
    used = [run for run in runs if is_number(run.metrics.get(name)) and path not in run.outdated]
    if not used:
        why = [
            f"; stale in {shortened(run.name)}: {line}"
            for run in runs
            for line in run.freshness.lines()
        ]
        raise UserError(f"no experiment has run the stage that writes {path}{''.join(why[:1])}")
    huge = [run.name for run in used if abs(run.metrics[name]) > _LARGEST]
    if huge:
        raise UserError(f"{shortened(name)} of {shortened(huge[0])} is beyond {_LARGEST:g}")
    axes = _varied([run.params for run in used], seeds)
    cells: dict[str, list[Run]] = {}
    for run in used:
        cells.setdefault(key_of([run.params.get(axis) for axis in axes]), []).append(run)
    if highest is None:
        parts = name.partition(":")[2].split(".")
        highest = "gain" in parts or parts[-1] not in LOWEST_IS_BEST
    configurations = [_configuration(axes, group, name, seeds) for group in cells.values()]
    if len(configurations) > 1 and len({c.score.mean for c in configurations}) == 1:
        raise UserError(
            f"{name} is the same in all {len(configurations)} configurations; these differ: "
            f"{', '.join(_differing(used)) or 'none'}"
        )
    configurations.sort(key=lambda each: -each.score.mean if highest else each.score.mean)
    paired, noise, errors = _noise([each.values for each in configurations])
    optimism = None
    if noise is not None:
        means = np.array([each.score.mean for each in configurations])
        optimism = optimism_of_the_maximum(means if highest else -means, errors)
    best = set(configurations[0].experiments)
    reported = [
        run.metrics[REPORTED]
        for run in used
        if run.name in best
        and is_number(run.metrics.get(REPORTED))
        and REPORTED.partition(":")[0] not in run.outdated
    ]
    # The split of runs from before `data.split_seed` followed `seed`.
    splits = len({key_of(run.params.get(SPLIT_SEED, run.params.get("seed"))) for run in used})
    known = len(reported) == len(best) and splits == 1
    return Summary(
        name, highest, seeds, configurations, paired, noise, optimism,
        Score.of(reported) if known else None, splits,
    )  # fmt: skip


def optimism_of_the_maximum(
    means: ArrayLike, errors: ArrayLike, draws: int = _DRAWS, seed: int = 0
) -> float:
    """How much the largest of means [K] exceeds its own truth on average; 0 for one mean.

    See the module for the method. `errors` [K] are standard errors of the means; what moves all means
    alike is no part of them.
    """
    found, error = np.asarray(means, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if len(found) < 2 or not error.any():
        return 0.0
    spread = max(0.0, float(np.var(found, ddof=1) - np.mean(error**2)))
    total = np.maximum(spread + error**2, np.finfo(np.float64).tiny)
    average = np.average(found, weights=1 / total)
    centres = average + spread / total * (found - average)
    noise = np.random.default_rng(seed).standard_normal((draws, len(found))) * error
    largest = (centres + noise).argmax(axis=1)
    return float(noise[np.arange(draws), largest].mean())


def _noise(cells: Sequence[Mapping[str, float]]) -> tuple[bool, float | None, Floats]:
    """Whether all cells share their seeds; a run's deviation from its cell; errors [K] of the means.

    With shared seeds it is the residual of a two-way layout without interaction: what a seed does to
    all cells alike chooses none of them. Otherwise the deviation within cells, pooled.
    """
    counts = np.array([len(cell) for cell in cells])
    paired = len(cells) > 1 and counts[0] > 1 and len({frozenset(cell) for cell in cells}) == 1
    if paired:
        table = np.array([[cell[seed] for seed in cells[0]] for cell in cells])
        rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        squares, freedom = float((rest**2).sum()), (table.shape[0] - 1) * (table.shape[1] - 1)
    else:
        squares = sum(float(np.var(list(cell.values())) * len(cell)) for cell in cells)
        freedom = int((counts - 1).sum())
    if not freedom:
        return paired, None, np.zeros(len(cells))
    noise = math.sqrt(squares / freedom)
    return paired, noise, noise / np.sqrt(counts)


def _configuration(
    axes: Sequence[str], group: Sequence[Run], metric: str, seeds: str
) -> Configuration:
    first = {key_of(run.params[seeds]): run for run in reversed(group)}
    values = {seed: float(first[seed].metrics[metric]) for seed in sorted(first)}
    params = {axis: group[0].params.get(axis) for axis in axes}
    names = [first[seed].name for seed in values]
    return Configuration(params, Score.of(list(values.values())), values, names)


def _resolve(metric: str, runs: Sequence[Run]) -> str:
    """The one metric that is called this, with or without its file."""
    known = {name: None for run in runs for name, value in run.metrics.items() if is_number(value)}
    found = [name for name in known if metric in {name, name.partition(":")[2]}]
    if len(found) == 1:
        return found[0]
    near = found or get_close_matches(metric, known, 5, 0.3)
    problem = "is in several files" if found else "is no metric of these experiments"
    raise UserError(f"{metric} {problem}; name one like {', '.join(near) or 'FILE:NAME'}")


def _varied(documents: Sequence[Mapping[str, Any]], seeds: str) -> list[str]:
    names = {name: None for document in documents for name in document}
    return [
        name
        for name in names
        if name != seeds
        and not name.startswith(_NO_AXIS)
        and len({key_of(document.get(name)) for document in documents}) > 1
    ]


def _differing(runs: Sequence[Run], most: int = 8) -> list[str]:
    """Metrics that may choose and that tell these runs apart."""
    names = {name: None for run in runs for name in run.metrics}
    found = [
        name
        for name in names
        if name.partition(":")[0] not in TEST_METRICS
        and len({run.metrics.get(name) for run in runs}) > 1
    ]
    return found[:most] + ["…"] * (len(found) > most)


def key_of(value: Any) -> str:
    """What tells values of any kind apart."""
    return json.dumps(value, sort_keys=True, default=str)


# --------------------------------------------------------------------------- what is written


def render(summary: Summary, *, markdown: bool = False) -> str:
    """The table, best first, and what it comes to; plain text or Markdown."""
    best, n = summary.best, len(summary.configurations)
    runs = sum(each.score.n for each in summary.configurations)
    end = "highest" if summary.highest else "lowest"
    draw = markdown_table if markdown else text_table
    escape = escaping.markdown if markdown else terminal

    def shown(text: str) -> str:
        return escape(shortened(text))

    rows = [
        [
            *(shown(as_text(value)) for value in c.params.values()),
            *(str(c.score.n), str(c.score), " ".join(map(shown, c.experiments))),
        ]
        for c in summary.configurations
    ]
    chosen = ", ".join(f"{shown(k)}={shown(as_text(v))}" for k, v in best.params.items())
    lines = [
        (
            f"{shown(summary.metric)}, the {end} is best: {n} configurations, {runs} runs over "
            f"{shown(summary.seeds)}"
        ),
        "",
        draw([*map(shown, best.params), "seeds", "mean ± sd", "experiments"], rows),
        "",
        f"best: {chosen or 'the only one'}, {best.score}",
    ]
    if n > 1 and summary.corrected is None:
        lines.append(
            "not corrected for having been chosen: no configuration was run with two seeds"
        )
    elif n > 1 and summary.noise is not None:
        how = "beside what a seed does to all" if summary.paired else "of one run"
        lines.append(
            f"corrected for having been the best of {n}: {summary.corrected:.4f} "
            f"(optimism {summary.optimism:.4f}; noise {how} {summary.noise:.4f})"
        )
    if summary.splits > 1:
        lines.append(
            f"VAL_TEST of the best is not shown: the experiments have {summary.splits} splits ({SPLIT_SEED}), "
            "so that images of one's VAL_TEST chose another; sweep over seed alone"
        )
    elif summary.reported is None:
        lines.append(
            f"VAL_TEST of the best is not known, as `evaluate` did not run in {shown(best.experiments[0])}: "
            f"dvc exp apply {shown(shlex.quote(best.experiments[0]))} && dvc repro"
        )
    else:
        lines.append(f"VAL_TEST of the best, {REPORTED}: {summary.reported}")
    return "\n".join(lines) if not markdown else "\n".join(_paragraphs(lines))


def document(summary: Summary) -> dict[str, Any]:
    """The same for machines, as finite JSON."""
    return {
        **{key: value for key, value in asdict(summary).items() if key != "configurations"},
        "configurations": [asdict(each) for each in summary.configurations],
        "corrected": summary.corrected,
    }


def columns(summary: Summary) -> dict[str, list[Any]]:
    """One row a run, for a CSV file: configuration from 1 (best), parameters, seed, metric, experiment."""
    rows = [
        [rank, *map(as_text, each.params.values()), seed, each.values[seed], name]
        for rank, each in enumerate(summary.configurations, 1)
        for seed, name in zip(each.values, each.experiments, strict=True)
    ]
    names = ["rank", *summary.best.params, summary.seeds, summary.metric, "experiment"]
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a metric is one, neither a text nor a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_text(value: Any) -> str:
    """A parameter's value as one would write it."""
    return value if isinstance(value, str) else json.dumps(value)


def _paragraphs(lines: Sequence[str]) -> list[str]:
    """Markdown joins lines: those below the table become a list."""
    last = max(place for place, line in enumerate(lines) if not line)
    return [*lines[: last + 1], *(f"- {line}" for line in lines[last + 1 :])]
