"""What answers earn, by subnet: `REWARDS`, each with the exact mean of its windows and a simulation of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from streetvision.errors import UserError
from streetvision.evaluation.metrics import Floats, check_prior, check_sample
from streetvision.subnet import reward, sn34

_COLUMNS = 6  # of a class: pictures, called roadwork, errors and squared errors of either answer
# From sums of `answer_columns` [R, 12] and the share of roadwork to mean and standard deviation [R].
Moments: TypeAlias = Callable[[Floats, float], tuple[Floats, Floats]]
# From labels and answers [runs, length] of windows to what each earns at its end.
Pay: TypeAlias = Callable[[ArrayLike, ArrayLike], Floats]


@dataclass(frozen=True)
class Reward:
    """A subnet's pay.

    Attributes
    ----------
    name, formula : in words
    window : challenges that one payment rests on
    fixed_classes : whether a window has a fixed number of each class, or labels are drawn
    """

    name: str
    formula: str
    window: int
    fixed_classes: bool
    _moments: Moments
    _pay: Pay

    def moments(self, sums: Floats, positive_share: float) -> tuple[Floats, Floats]:
        """Mean [R] and standard deviation [R] of one payment; NaN where a class has no picture.

        `sums` [R, 12] are those of `answer_columns`, weighted in any way: each class counts by
        `positive_share`, whatever its weight.
        """
        sums = np.atleast_2d(sums)
        known = (sums[:, 0] > 0) & (sums[:, _COLUMNS] > 0)
        mean, deviation = np.full(len(sums), np.nan), np.full(len(sums), np.nan)
        if known.any():
            mean[known], deviation[known] = self._moments(sums[known], check_prior(positive_share))
        return mean, deviation

    def expected(
        self,
        labels: ArrayLike,
        probabilities: ArrayLike,
        weights: ArrayLike | None = None,
        positive_share: float = 0.5,
    ) -> tuple[Floats, Floats]:
        """`moments` of labels [N] and probabilities [N], with weights [N] or [R, N] >= 0.

        Raises
        ------
        UserError
            As `check_sample`.
        """
        columns = answer_columns(labels, probabilities)
        given = np.ones(len(columns)) if weights is None else np.asarray(weights, dtype=np.float64)
        return self.moments(np.atleast_2d(given) @ columns, positive_share)

    def simulate(
        self,
        labels: ArrayLike,
        probabilities: ArrayLike,
        weights: ArrayLike | None = None,
        positive_share: float = 0.5,
        *,
        runs: int,
        seed: int,
    ) -> Floats:
        """Payments [runs] for independent windows of pictures drawn from these by their weights [N].

        UserError where a class has no picture.
        """
        y, p = check_sample(labels, probabilities)
        given = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
        rng, share = np.random.default_rng(seed), check_prior(positive_share)
        if self.fixed_classes:
            positives = min(max(round(share * self.window), 1), self.window - 1)
            drawn = np.tile((np.arange(self.window) < positives).astype(np.int64), (runs, 1))
        else:
            drawn = (rng.random((runs, self.window)) < share).astype(np.int64)
        answers = np.empty(drawn.shape)
        for label in (0, 1):
            of_class = given * (y == label)
            if not of_class.sum() > 0:
                raise UserError(f"no picture with label {label} to draw from")
            chosen = rng.choice(len(y), int((drawn == label).sum()), p=of_class / of_class.sum())
            answers[drawn == label] = p[chosen]
        return self._pay(drawn, answers)


def answer_columns(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """What rewards need of each answer, [N, 12]: their (weighted) sums are enough for the moments.

    For each class: pictures, called roadwork (p > 0.5); squared error and its square, of answers "no
    roadwork", then of answers "roadwork".
    """
    y, p = check_sample(labels, probabilities)
    error = sn34.squared_error(y, p)
    yes = (p > 0.5).astype(np.float64)
    columns = np.column_stack(
        [np.ones(len(y)), yes, (1 - yes) * error, (1 - yes) * error**2, yes * error, yes * error**2]
    )
    return np.hstack([columns * (y == label)[:, None] for label in (0, 1)])


def _answers(sums: Floats) -> sn34.Answers:
    """From the sums [R, 6] of one class."""
    pictures, yes = sums[:, 0], sums[:, 1]
    counts = np.column_stack([pictures - yes, yes])
    mean, square = (
        np.divide(sums[:, [first, first + 2]], counts, out=np.zeros(counts.shape), where=counts > 0)
        for first in (2, 3)
    )
    return sn34.Answers(np.clip(yes / pictures, 0, 1), mean, np.maximum(square - mean**2, 0))


def _sn72_moments(sums: Floats, positive_share: float) -> tuple[Floats, Floats]:
    negatives, positives = _answers(sums[:, :_COLUMNS]), _answers(sums[:, _COLUMNS:])
    return reward.reward_moments(positives.rate, negatives.rate, positive_share)


def _sn34_moments(sums: Floats, positive_share: float) -> tuple[Floats, Floats]:
    negatives, positives = _answers(sums[:, :_COLUMNS]), _answers(sums[:, _COLUMNS:])
    return sn34.score_moments(negatives, positives, positive_share)


def _sn72_pay(labels: ArrayLike, answers: ArrayLike) -> Floats:
    return reward.rewards(answers, labels)[..., -1]


REWARDS = {
    "sn72": Reward(
        "Subnet 72",
        f"(MCC of the last {reward.MCC_WINDOW} / 2 + accuracy of the last {reward.ACCURACY_WINDOW} / 2)^"
        f"{reward.POWER}",
        reward.MCC_WINDOW,
        False,
        _sn72_moments,
        _sn72_pay,
    ),
    "sn34": Reward(
        "Subnet 34",
        "sqrt(((MCC + 1) / 2)^1.2 * ((0.25 - Brier) / 0.25)^1.8)",
        sn34.CHALLENGES,
        True,
        _sn34_moments,
        sn34.score,
    ),
}
