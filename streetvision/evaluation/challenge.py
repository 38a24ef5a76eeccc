"""A bundle under challenge: VAL_TEST as the subnet's validators send it, and what that would earn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.artifacts import write_bytes_atomic, write_json_atomic
from streetvision.core.errors import UserError
from streetvision.core.processes import in_threads
from streetvision.core.progress import progress
from streetvision.data.store import Originals, Split
from streetvision.stats.bootstrap import (
    Interval,
    Resting,
    check_groups,
    statistic_intervals,
)
from streetvision.stats.metrics import Floats, Integers, all_metrics, count_metrics, prior_weights
from streetvision.subnet.payment import REWARDS
from streetvision.subnet.profiles import HALT, ValidatorProfile, profile
from streetvision.subnet.reward import beats_rival, reward_moments, simulate_rewards
from streetvision.subnet.served import Task, open_jpeg, served_jpegs

if TYPE_CHECKING:
    from streetvision.bundle.predictor import Predictor
    from streetvision.core.params import Challenge, SourceShare, Subnet

# Shares that add up to this much less than 1 leave nothing for other sources.
SHARE_TOLERANCE = 1e-6
METRICS = ("accuracy", "mcc", "fnr", "fpr")
_RANGES = {"accuracy": (0.0, 1.0), "mcc": (-1.0, 1.0), "fnr": (0.0, 1.0), "fpr": (0.0, 1.0),
           "reward": (0.0, 1.0)}  # fmt: skip


@dataclass(frozen=True)
class ChallengeReport:
    """`report` is the content of `challenge.json`; `plots` are PNG bytes by name."""

    report: dict[str, Any]
    plots: dict[str, bytes]


@dataclass(frozen=True)
class Served:
    """Answers to what one validator sends: probabilities [N, L, K] of its L levels and K repeats."""

    validator: ValidatorProfile
    probabilities: Floats


def challenge_split(
    predictor: Predictor,
    split: Split,
    originals: Originals | None,
    subnet: Subnet,
    challenge: Challenge,
    served_prior: float,
    *,
    seed: int,
    workers: int,
) -> ChallengeReport:
    """Send the images of `split` as each validator does, score them and report what it would pay.

    What is sent are the files in `originals`, and the images that have none are left out; without it, the
    stored copies. The first validator is `subnet.validator`.

    Raises
    ------
    UserError
        A file of no image of `split`; one class only; `served_prior` outside (0, 1);
        `challenge.source_shares` do not fit the sources.
    """
    if originals is not None and len(originals):
        place = {name: row for row, name in enumerate(split.ids)}
        for name in originals.ids:
            if name not in place:
                raise UserError(
                    f"there is an original file of {name}, which is not in VAL_TEST; rerun `prepare`"
                )
        split = split.select([place[name] for name in originals.ids])
        files = originals.image_bytes
    else:
        originals, files = None, split.image_bytes
    prior_weights(split.labels, served_prior)  # refuses one class before the work
    sources = split.column("source")
    source_weights(split.labels, sources, challenge.source_shares)
    names = dict.fromkeys([subnet.validator, *challenge.validators])
    served = []
    for sender in map(profile, names):
        repeats = challenge.repeats if sender.drawn_levels else 1
        total = len(split) * len(sender.levels) * repeats
        tasks = (Task(str(name), files(row)) for row, name in enumerate(split.ids))
        jpegs = served_jpegs(
            sender, tasks, sender.levels, repeats, seed, subnet.flip_probability, workers
        )
        images = in_threads(open_jpeg, progress(jpegs, total, sender.name), workers)
        shape = (len(split), len(sender.levels), repeats)
        served.append(Served(sender, predictor.probabilities(images).reshape(shape)))
    skew = None
    whole = next((each for each in served if each.validator.side is None), None)
    if originals is not None and whole is not None:
        rows = progress(range(len(split)), len(split), "stored copies")
        stored = predictor.probabilities(in_threads(split.image, rows, workers))
        skew = skew_report(split.labels, whole.probabilities[:, 0, 0], stored, served_prior)
    return challenge_report(
        split.labels, served, split.groups, sources, challenge, served_prior, seed, skew
    )


def skew_report(
    labels: Integers, sent: Floats, stored: Floats, served_prior: float
) -> dict[str, float]:
    """How answers [N] to whole pictures as they are sent differ from those to the stored copies.

    Sent is the file itself, encoded anew and not turned; stored what the network was trained on.
    """
    weights = prior_weights(labels, served_prior)

    def mcc(probabilities: Floats) -> float:
        return all_metrics(labels, probabilities, weights)["mcc"]

    return {
        "decisions_that_differ": float(((sent > 0.5) != (stored > 0.5)).mean()),
        "mean_difference": float(np.abs(sent - stored).mean()),
        "mcc_sent": mcc(sent),
        "mcc_stored": mcc(stored),
    }


def source_weights(labels: ArrayLike, sources: ArrayLike, shares: Sequence[SourceShare]) -> Floats:
    """Weights [N] by which each class, labels [N], is a mixture of the sources [N] by `shares`.

    Sources without a share divide the rest by their images; in a class that a source has no images of, the
    others take its share. The weights of a class add up to its images.

    Raises
    ------
    UserError
        A source is not there, a class has images of no source with a share, or nothing takes the rest.
    """
    y, names = np.asarray(labels), np.asarray(sources, dtype=object)
    weights = np.ones(len(y))
    if not shares:
        return weights
    given = {each.source: each.share for each in shares}
    known = sorted({str(name) for name in names})
    for name in given:
        if name not in known:
            raise UserError(
                f'challenge.source_shares: no image of VAL_TEST is of "{name}"; there are {", ".join(known)}'
            )
    rest = max(0.0, 1 - sum(given.values()))
    parts = [(names == name, share) for name, share in given.items()]
    parts.append((~np.isin(names, list(given)), rest))
    if not parts[-1][0].any() and rest > SHARE_TOLERANCE:
        raise UserError(f"challenge.source_shares leave {rest:g} for other sources; there are none")
    for positive in (0, 1):
        of_class = y == positive
        for rows, share in parts:
            count = (rows & of_class).sum()
            weights[rows & of_class] = share / max(count, 1)
        total = weights[of_class].sum()
        if total <= 0:
            raise UserError(
                f"challenge.source_shares: no image with label {positive} is of a source with a share"
            )
        weights[of_class] *= of_class.sum() / total
    return weights


def challenge_report(
    labels: ArrayLike,
    served: Sequence[Served],
    groups: ArrayLike,
    sources: ArrayLike,
    challenge: Challenge,
    served_prior: float,
    seed: int,
    skew: Mapping[str, float] | None = None,
) -> ChallengeReport:
    """Report on labels [N], the answers to each validator, groups and sources [N]; the first leads.

    Metrics are at the served prior; each class is a mixture of a validator's levels by their shares and of the
    sources by `challenge.source_shares` (`source_weights`). `reward` is Subnet 72's, `reward_sn34` Subnet 34's
    of the same answers.
    The reward's mean and standard deviation are of one challenge, with full windows. Intervals count groups;
    `effective_groups` tells how many of equal size would tell as much (see `bootstrap.Resting`).
    """
    from streetvision.plots import pictures as plots

    first = served[0]
    y, _, index = check_groups(labels, first.probabilities[:, 0, 0], groups)
    weights = source_weights(y, sources, challenge.source_shares)
    settings = (served_prior, challenge.n_resamples, seed)
    validators: dict[str, dict[str, Any]] = {}
    bars: dict[str, Interval] = {}
    for each in served:
        name, shares = each.validator.name, np.array(each.validator.level_shares)
        overall = _overall(y, each.probabilities, index, weights, shares, *settings)
        found = validators[name] = _row(overall)
        bars[name] = overall["mcc"]
        sn34 = REWARDS["sn34"].expected(
            np.repeat(y, each.probabilities[0].size),
            each.probabilities.reshape(-1),
            (weights[:, None, None] * shares[:, None] * np.ones(each.probabilities.shape)).reshape(
                -1
            ),
            served_prior,
        )
        found["reward_sn34"] = {"mean": float(sn34[0][0]), "standard_deviation": float(sn34[1][0])}
        if each is first:
            lead = overall
        if len(shares) == 1:
            continue
        found["levels"] = {}
        for level, share in enumerate(shares):
            one = each.probabilities[:, [level]]
            of_level = _overall(y, one, index, weights, np.ones(1), *settings)
            found["levels"][f"level_{level}"] = {"share": float(share), **_row(of_level)}
            bars[f"{name}\n{level}"] = of_level["mcc"]
    fnr, fpr = lead["fnr"].value, lead["fpr"].value
    deviation = float(reward_moments(1 - fnr, fpr, served_prior)[1][0])
    simulated = simulate_rewards(
        1 - fnr, fpr, served_prior, challenge.simulated_days, challenge.challenges_per_day, seed
    )
    often = (first.probabilities > 0.5).mean(axis=2) @ np.array(first.validator.level_shares)
    leading = validators[first.validator.name]
    report = {
        "validator": first.validator.name,
        **leading,
        "reward": {
            **leading["reward"],
            "standard_deviation": deviation,
            "standard_deviation_of_a_day": float(simulated.mean(axis=1).std()),
            "simulated_mean": float(simulated.mean()),
        },
        "interval_method": lead["reward"].method,
        "validators": validators,
        "sources": _by_source(
            y,
            often,
            np.asarray(sources, dtype=object),
            weights * prior_weights(y, served_prior) / len(y),
        ),
        "n": len(y),
        "n_groups": int(index.max()) + 1,
        "effective_groups": {
            "negatives": lead["fpr"].effective_groups,
            "positives": lead["fnr"].effective_groups,
        },
        "challenges_scored": int(sum(each.probabilities.size for each in served)),
        "served_prior": served_prior,
        "rival": _rival(lead["accuracy"], challenge),
        "skew": skew,
        "unmeasured": _unmeasured(first.validator, mixed=bool(challenge.source_shares)),
        "status": HALT,
    }
    low, high = (
        [np.nan if (v := getattr(bar, side)) is None else v for bar in bars.values()]
        for side in ("low", "high")
    )
    pictures = {
        "challenge_levels.png": plots.plot_challenge_levels(
            [*bars], [bar.value for bar in bars.values()], low, high
        ),
        "reward.png": plots.plot_reward(simulated, lead["reward"].value),
    }
    return ChallengeReport(report, pictures)


def _row(found: Mapping[str, Interval]) -> dict[str, Any]:
    """Metrics with their intervals and the reward, of one validator or level."""
    return {
        **{name: found[name].value for name in METRICS},
        "interval": {name: _bounds(found[name]) for name in METRICS},
        "reward": {"mean": found["reward"].value, **_bounds(found["reward"])},
    }


def _unmeasured(sender: ValidatorProfile, *, mixed: bool) -> str:
    """What of a validator's challenges is not in the numbers."""
    other = 1 - dict(sender.sources)["real"]
    rest = (
        "Sources are mixed by the given shares; whether the ones here are like the subnet's is not known."
        if mixed
        else "None can be made here: these numbers are of the test images alone."
    )
    return (
        f"{other:.0%} of the challenges of the validator `{sender.name}` are generated images or NATIX's own "
        f"tasks. {rest}"
    )


def write_challenge(found: ChallengeReport, report: Path, plots: Path) -> list[Path]:
    """Write the report and the plots; returns the files."""
    written = [write_bytes_atomic(plots / name, data) for name, data in found.plots.items()]
    return [*written, write_json_atomic(report, found.report)]


def _overall(
    labels: Integers,
    probabilities: Floats,
    index: Integers,
    weights: Floats,
    shares: Floats,
    served_prior: float,
    n_resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Metrics and reward of challenges whose classes and levels are mixed by given shares.

    In its class an image counts by its weight [N].
    """
    n_groups = int(index.max()) + 1
    key = index * 2 + labels
    images: Floats = np.bincount(key, weights, n_groups * 2).reshape(n_groups, 2).astype(np.float64)
    # How often each image is called roadwork, over levels and repeats.
    often = (probabilities > 0.5).mean(axis=2) @ shares
    called = np.bincount(key, often * weights, minlength=n_groups * 2).reshape(n_groups, 2)

    def evaluate(multiplicities: Floats, names: Sequence[str]) -> dict[str, Floats]:
        size = multiplicities @ images
        rate = np.divide(multiplicities @ called, size, out=np.full(size.shape, np.nan),
                         where=size > 0)  # fmt: skip
        fpr, tpr = np.clip(rate, 0, 1).T
        counts = count_metrics(
            tp=served_prior * tpr, fp=(1 - served_prior) * fpr,
            tn=(1 - served_prior) * (1 - fpr), fn=served_prior * (1 - tpr),
        )  # fmt: skip
        defined = np.isfinite(tpr) & np.isfinite(fpr)
        reward = np.full(len(tpr), np.nan)
        reward[defined] = reward_moments(tpr[defined], fpr[defined], served_prior)[0]
        counts["mcc"] = np.where(defined, counts["mcc"], np.nan)
        return {name: reward if name == "reward" else counts[name] for name in names}

    resting = dict.fromkeys(_RANGES, Resting.of(images, served_prior))
    resting |= {"fnr": Resting.of(images[:, 1:]), "fpr": Resting.of(images[:, :1])}
    return statistic_intervals(evaluate, n_groups, resting, _RANGES, n_resamples, seed=seed)


def _by_source(
    labels: Integers, often: Floats, sources: NDArray[Any], weights: Floats
) -> dict[str, dict[str, float]]:
    """Of each source its share of the challenges, its images of each class, and how often each is mistaken."""
    found: dict[str, dict[str, float]] = {}
    for name in sorted(set(sources)):
        rows = sources == name
        row: dict[str, float] = {"share": float(weights[rows].sum())}
        for positive, count, rate in ((1, "positives", "fnr"), (0, "negatives", "fpr")):
            called = often[rows & (labels == positive)]
            row[count] = len(called)
            if len(called):
                row[rate] = float(1 - called.mean() if positive else called.mean())
        found[str(name)] = row
    return found


def _bounds(interval: Interval) -> dict[str, float]:
    if interval.low is None or interval.high is None:
        return {}
    return {"low": interval.low, "high": interval.high}


def _rival(accuracy: Interval, challenge: Challenge) -> dict[str, float]:
    """Probability of beating the rival over a day; it increases with accuracy, so bounds map to bounds."""

    def probability(value: float) -> float:
        return beats_rival(value, challenge.rival_accuracy, challenge.challenges_per_day)

    return {
        "accuracy": challenge.rival_accuracy,
        "challenges_per_day": challenge.challenges_per_day,
        "probability_to_beat": probability(accuracy.value),
        **{side: probability(value) for side, value in _bounds(accuracy).items()},
    }
