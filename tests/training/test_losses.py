"""Losses against a slow obvious version, torchvision and scikit-learn, and far from 0."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from streetvision.core.errors import UserError
from streetvision.core.params import Train
from streetvision.training.losses import balanced_weights, make_loss

LABELS = np.array([0] * 70 + [1] * 30)
LOSSES = ("ce", "weighted_ce", "focal")


def batch(seed: int = 0, soft: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    targets = rng.random(40) if soft else rng.integers(0, 2, 40)
    return torch.from_numpy(rng.normal(0, 3, 40)).float(), torch.from_numpy(targets).float()


def slow(train: Train, labels: NDArray[np.int64], logits: Any, targets: Any) -> float:
    total = 0.0
    for x, target in zip(logits.tolist(), targets.tolist(), strict=True):
        t = target * (1 - train.label_smoothing) + 0.5 * train.label_smoothing
        p = 1 / (1 + math.exp(-x))
        positive, negative = -t * math.log(p), -(1 - t) * math.log(1 - p)
        if train.loss == "weighted_ce":
            positive *= len(labels) / (2 * np.sum(labels == 1))
            negative *= len(labels) / (2 * np.sum(labels == 0))
        if train.loss == "focal":
            positive *= train.focal_alpha[1] * (1 - p) ** train.focal_gamma
            negative *= train.focal_alpha[0] * p**train.focal_gamma
        total += positive + negative
    return total / len(logits)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LOSSES), st.floats(0, 5), st.floats(0.05, 5), st.floats(0.05, 5),
    st.floats(0, 0.9), st.integers(1, 99), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_losses_are_what_the_formulas_say(
    loss: Any, gamma: float, alpha_0: float, alpha_1: float, smoothing: float,
    n_positive: int, soft: bool, seed: int,
) -> None:  # fmt: skip
    train = Train(
        loss=loss, focal_gamma=gamma, focal_alpha=[alpha_0, alpha_1], label_smoothing=smoothing
    )
    labels = (np.arange(100) < n_positive).astype(np.int64)
    logits, targets = batch(seed, soft)
    found = make_loss(train, labels)(logits, targets)
    assert found.shape == ()
    assert float(found) == pytest.approx(slow(train, labels, logits, targets), rel=2e-5)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_torchvisions(alpha: float, gamma: float) -> None:
    """Its alpha weighs the positives and 1 - alpha the negatives; it knows hard targets only."""
    logits, targets = batch(1, soft=False)
    wanted = sigmoid_focal_loss(logits, targets, alpha, gamma, reduction="mean")
    train = Train(loss="focal", focal_alpha=[1 - alpha, alpha], focal_gamma=gamma)
    torch.testing.assert_close(make_loss(train, LABELS)(logits, targets), wanted)


FORMS = {
    "[N]": lambda two: two[:, 1] - two[:, 0],
    "[N, 1]": lambda two: two[:, 1:] - two[:, :1],
    "[N, 2]": lambda two: two,
    "array [N, 2]": lambda two: two.numpy(),
    "list [N, 2]": lambda two: two.tolist(),
    "BF16 [N, 2]": lambda two: two.bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_logits_of_two_classes_are_their_softmax(loss: Any, form: str) -> None:
    """Against PyTorch's cross entropy over the two classes, weighed image by image."""
    rng = np.random.default_rng(3)
    two = torch.from_numpy(rng.normal(0, 3, (40, 2))).float()
    targets = torch.from_numpy(rng.integers(0, 2, 40))
    train = Train(loss=loss, focal_gamma=1.5, focal_alpha=[0.4, 1.7])
    given = two.bfloat16().float() if form.startswith("BF16") else two
    each = functional.cross_entropy(given, targets, reduction="none")
    if loss == "focal":
        each = torch.tensor([0.4, 1.7])[targets] * (1 - torch.exp(-each)) ** 1.5 * each
    if loss == "weighted_ce":
        each = torch.tensor(balanced_weights(LABELS))[targets] * each
    found = make_loss(train, LABELS)(FORMS[form](two), targets)
    tolerance = 2e-2 if form == "BF16 [N, 2]" else 1e-5  # a difference of BF16 numbers is one
    torch.testing.assert_close(found, each.mean().float(), rtol=tolerance, atol=1e-6)
    for other in (targets.tolist(), targets.numpy(), targets[:, None]):
        torch.testing.assert_close(make_loss(train, LABELS)(FORMS[form](two), other), found)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_reach_both_logits(loss: Any) -> None:
    two = torch.randn(8, 2, requires_grad=True)
    make_loss(Train(loss=loss), LABELS)(two, torch.arange(8) % 2).backward()
    assert two.grad is not None
    torch.testing.assert_close(two.grad[:, 0], -two.grad[:, 1])
    assert (two.grad != 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (np.zeros((4, 3)), np.zeros(4), r"logits have shape \(4, 3\); \[B\], \[B, 1\] or \[B, 2\]"),
        (np.zeros((4, 2, 1)), np.zeros(4), r"logits have shape \(4, 2, 1\)"),
        (0.5, [1.0], r"logits have shape \(\)"),
        (np.zeros((4, 2)), np.zeros((4, 2)), r"4 logits but targets of shape \(4, 2\)"),
        (np.zeros(4), np.zeros(3), r"4 logits but targets of shape \(3,\)"),
    ],
)
def test_other_shapes_are_refused(loss: Any, logits: Any, targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_loss(Train(loss=loss), LABELS)(logits, targets)


def test_focal_without_gamma_and_weights_is_cross_entropy() -> None:
    logits, targets = batch(2)
    focal = Train(loss="focal", focal_gamma=0.0, focal_alpha=[1.0, 1.0], label_smoothing=0.1)
    found = make_loss(focal, LABELS)(logits, targets)
    wanted = make_loss(Train(loss="ce", label_smoothing=0.1), LABELS)(logits, targets)
    torch.testing.assert_close(found, wanted)


@given(st.integers(1, 500), st.integers(1, 500))
def test_weights_are_sklearns_and_one_on_average(n_negative: int, n_positive: int) -> None:
    labels = np.repeat([0, 1], [n_negative, n_positive])
    found = balanced_weights(labels)
    wanted = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    np.testing.assert_allclose(found, wanted)
    assert np.array(found)[labels].mean() == pytest.approx(1)


def test_weighted_loss_counts_both_classes_alike() -> None:
    """Of one guess for all images it is what cross entropy is on balanced ones."""
    logits = torch.full((len(LABELS),), 1.3)
    found = make_loss(Train(loss="weighted_ce"), LABELS)(logits, torch.from_numpy(LABELS))
    halves = torch.tensor([0.0, 1.0])
    wanted = make_loss(Train(loss="ce"), LABELS)(logits[:2], halves)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("labels", [np.zeros(5, np.int64), np.ones(5, np.int64)])
def test_weights_need_both_classes(labels: NDArray[np.int64]) -> None:
    with pytest.raises(UserError, match="weighted_ce needs images of both classes"):
        make_loss(Train(loss="weighted_ce"), labels)
    for loss in ("ce", "focal"):
        make_loss(Train(loss=loss), labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_logits_give_finite_losses_and_gradients(
    loss: Any, gamma: float, dtype: torch.dtype
) -> None:
    values = [-1000.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0]
    train = Train(loss=loss, focal_gamma=gamma)
    for target in (0.0, 0.3, 1.0):
        logits = torch.tensor(values, dtype=dtype, requires_grad=True)
        found = make_loss(train, LABELS)(logits, torch.full((len(values),), target))
        assert found.dtype == torch.float32
        found.backward()
        assert torch.isfinite(found)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
    # A confident mistake costs its logit.
    wrong = make_loss(train, LABELS)(torch.tensor([100.0]), torch.tensor([0.0]))
    weight = balanced_weights(LABELS)[0] if loss == "weighted_ce" else 1.0
    assert float(wrong) == pytest.approx(100 * weight)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss: Any) -> None:
    train = Train(loss=loss, focal_gamma=1.5, focal_alpha=[0.4, 1.7], label_smoothing=0.05)
    logits, targets = batch(4)
    logits.requires_grad_()
    make_loss(train, LABELS)(logits, targets).backward()
    assert logits.grad is not None
    for i in range(5):
        step = torch.zeros(40, dtype=torch.float64)
        step[i] = 1e-5
        plain = logits.detach().double()
        change = slow(train, LABELS, plain + step, targets) - slow(
            train, LABELS, plain - step, targets
        )
        assert float(logits.grad[i]) == pytest.approx(change / 2e-5, rel=1e-3, abs=1e-6)
