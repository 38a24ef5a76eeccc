"""What the decision functions share: checks on arrays and documents, and the sigmoid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streetvision.core.errors import UserError


def as_array(values: Any) -> NDArray[Any]:
    """An array of a list, an array, or a tensor of any device, number format and gradient."""
    if hasattr(values, "detach"):  # a tensor, without importing torch for those who have none
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UserError(f"rows of different lengths are no array: {error}") from error


def check_logits(logits: ArrayLike) -> NDArray[np.float64]:
    """Return logits as log-odds [N] of roadwork in float64.

    Lists, arrays and tensors, [N] or [N, 1]; or [N, 2] of the classes None and Roadwork, whose softmax has
    the log-odds of their difference.

    Raises
    ------
    UserError
        If they have another shape, are no numbers, empty, or not all finite.
    """
    values = as_array(logits)
    if values.dtype.kind not in "biuf":
        raise UserError(f"logits are of type {values.dtype}; numbers are needed")
    values = values.astype(np.float64)
    if values.ndim == 2 and values.shape[1] in {1, 2}:
        with np.errstate(invalid="ignore"):  # of two infinite ones: said below
            values = values[:, -1] - (values[:, 0] if values.shape[1] == 2 else 0.0)
    if values.ndim != 1:
        raise UserError(
            f"logits have shape {values.shape}; [N], [N, 1] or [N, 2] (None, Roadwork) is needed"
        )
    if values.size == 0:
        raise UserError("logits are empty; at least one image of each class is needed")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise UserError(
            f"{bad.size} of {values.size} logits are not finite (the first at row {bad[0]})"
        )
    return values


def check_scores(
    logits: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return log-odds [N] as float64 and labels [N] as booleans, both classes present.

    Logits as `check_logits` takes them; labels [N] or [N, 1].

    Raises
    ------
    UserError
        If lengths differ, a logit is not finite, a label is not 0 or 1, or a class is missing.
    """
    values = check_logits(logits)
    truth = as_array(labels)
    if truth.ndim == 2 and truth.shape[1] == 1:
        truth = truth[:, 0]
    if truth.shape != values.shape:
        raise UserError(f"{values.size} logits but labels of shape {truth.shape}; one label each")
    if truth.dtype.kind not in "biuf":
        raise UserError(f"labels are of type {truth.dtype}; 0 (None) or 1 (Roadwork) is needed")
    wrong = truth[(truth != 0) & (truth != 1)]
    if wrong.size:
        raise UserError(f"label {wrong[0]} is not one of 0 (None), 1 (Roadwork)")
    positive = truth.astype(bool)
    if positive.all() or not positive.any():
        raise UserError(f"all {values.size} labels are {int(positive[0])}; both classes are needed")
    return values, positive


def check_weights(weights: ArrayLike | None, positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return sample weights [N] as float64 (ones for None).

    Raises
    ------
    UserError
        If lengths differ, a weight is negative or not finite, or a class weighs nothing.
    """
    if weights is None:
        return np.ones(positive.size)
    values = as_array(weights).astype(np.float64)
    if values.shape != positive.shape:
        raise UserError(f"{positive.size} labels but weights of shape {values.shape}; one each")
    if not np.isfinite(values).all() or (values < 0).any():
        raise UserError("a weight is negative or not finite; weights are finite and >= 0")
    if not (values[positive].sum() > 0 and values[~positive].sum() > 0):
        raise UserError("the weights of one class sum to 0; both classes must weigh something")
    return values


def check_groups(groups: ArrayLike, size: int) -> tuple[NDArray[np.intp], int]:
    """Return group codes 0 … G-1 [N] and G, the number of groups.

    Raises
    ------
    UserError
        If there is not one group per image.
    """
    names = np.asarray(groups)
    if names.shape != (size,):
        raise UserError(f"{size} logits but groups of shape {names.shape}; one group each")
    unique, codes = np.unique(names, return_inverse=True)
    return codes.astype(np.intp, copy=False), int(unique.size)


def check_number(value: Any, name: str) -> float:
    """Return `value` as float; UserError if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} is {value!r}; a finite number is needed")
    return float(value)


def check_positive(value: Any, name: str) -> float:
    """Return `value` as float; UserError if it is not a finite number > 0."""
    number = check_number(value, name)
    if number <= 0:
        raise UserError(f"{name} is {value!r}; it must be > 0")
    return number


def check_row(value: Any, name: str, *, ascending: bool = False) -> NDArray[np.float64]:
    """Return the tuple `value` as an array [K]; UserError unless finite numbers, K >= 1.

    With `ascending` each must be larger than the one before.
    """
    if not isinstance(value, tuple) or not value:
        raise UserError(f"{name} is {value!r}; a list of finite numbers is needed")
    row = np.array([check_number(number, f"a number of {name}") for number in value])
    if ascending and (np.diff(row) <= 0).any():
        raise UserError(f"{name} do not ascend; each must be larger than the one before")
    return row


def check_prior(value: Any, name: str) -> float:
    """Return the share of positives `value` as float; UserError unless 0 < value < 1."""
    prior = check_number(value, name)
    if not 0 < prior < 1:
        raise UserError(f"{name} is {value!r}; a share of positives between 0 and 1 is needed")
    return prior


def check_keys(document: object, wanted: set[str], name: str) -> Mapping[str, Any]:
    """Return `document`; UserError unless it is a mapping with exactly the keys `wanted`."""
    if not isinstance(document, Mapping):
        raise UserError(f"{name} is {document!r}; an object is needed")
    missing, unknown = sorted(wanted - set(document)), sorted(set(document) - wanted, key=str)
    if missing:
        raise UserError(f"{name} lacks {', '.join(missing)}")
    if unknown:
        raise UserError(
            f"{name} has unknown {', '.join(map(str, unknown))}; "
            f"allowed: {', '.join(sorted(wanted))}"
        )
    return document


def prior_shift(prior: float, served_prior: float) -> float:
    """What log-odds at one share of positives gain where another is served; shares in (0, 1).

    Saerens et al. (2002), doi 10.1162/089976602753284446: the difference of the priors' log-odds.
    """
    odds = np.array([prior / (1 - prior), served_prior / (1 - served_prior)])
    return float(np.diff(np.log(odds))[0])


def sigmoid(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return probabilities of log-odds, of the same shape, without overflow."""
    from scipy.special import expit

    return np.asarray(expit(log_odds), dtype=np.float64)
