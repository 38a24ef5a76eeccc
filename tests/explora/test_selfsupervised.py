"""Losses without labels against slow versions and lightly's, over ranks, in chunks; measures of a space."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from streetvision.core.errors import UserError
from streetvision.core.params import Explora
from streetvision.explora.selfsupervised import (
    BYOL,
    COLLAPSE_RANK,
    COLLAPSE_SPREAD,
    Objective,
    alignment,
    build_objective,
    byol_loss,
    cached_features,
    move_average,
    nt_xent,
    rankme,
    refuse_batch_statistics,
    sinkhorn,
    spread,
    swav_loss,
    teacher_decay,
    uniformity,
)
from streetvision.models.backbone import ARCHITECTURES, build_backbone
from tests.models.ranks import run_ranks

OBJECTIVES = get_args(Explora.model_fields["objective"].annotation)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    """Equation 1 of the paper, view by view."""
    views = np.concatenate([first.double().numpy(), second.double().numpy()])
    n = len(first)
    total = 0.0
    for i, anchor in enumerate(views):
        similarity = [
            float(anchor @ other / np.linalg.norm(anchor) / np.linalg.norm(other)) / temperature
            for other in views
        ]
        others = sum(math.exp(value) for k, value in enumerate(similarity) if k != i)
        total -= math.log(math.exp(similarity[(i + n) % (2 * n)]) / others)
    return total / (2 * n)


# --------------------------------------------------------------------------- losses


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 9), width=st.integers(1, 7), temperature=st.sampled_from([0.07, 0.2, 1.0]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_nt_xent_is_the_papers(n: int, width: int, temperature: float, seed: int) -> None:
    first, second = noise(n, width, seed=seed), noise(n, width, seed=seed + 1000)
    loss = float(nt_xent(first, second, temperature))
    assert loss == pytest.approx(slow_nt_xent(first, second, temperature), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("n", [2, 32, 64, 128])
def test_nt_xent_and_its_gradient_are_lightlys(n: int) -> None:
    first, second = noise(n, 16, seed=1).requires_grad_(), noise(n, 16, seed=2).requires_grad_()
    theirs = NTXentLoss(temperature=0.1, memory_bank_size=0)(first, second)
    expected = torch.autograd.grad(theirs, (first, second))
    ours = nt_xent(first, second, 0.1)
    torch.testing.assert_close(ours, theirs)
    for gradient, other in zip(torch.autograd.grad(ours, (first, second)), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [32, 64, 128])
def test_nt_xent_without_structure_is_log_2n_minus_1(n: int) -> None:
    assert float(nt_xent(torch.ones(n, 8), torch.ones(n, 8), 0.1)) == pytest.approx(
        math.log(2 * n - 1), rel=1e-5
    )
    random = float(nt_xent(noise(n, 512, seed=1), noise(n, 512, seed=2), 0.5))
    assert random == pytest.approx(math.log(2 * n - 1), abs=0.05)
    assert float(nt_xent(noise(n, 512), noise(n, 512), 0.1)) < 0.02


def test_losses_are_float32_under_autocast() -> None:
    first, second = noise(8, 16, seed=1), noise(8, 16, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        contrastive = nt_xent(first.bfloat16(), second.bfloat16(), 0.1)
        assigned = swav_loss(first.bfloat16(), second.bfloat16(), 0.1, 0.05, 3)
        predicted = byol_loss(first.bfloat16(), second.bfloat16())
    assert contrastive.dtype == assigned.dtype == predicted.dtype == torch.float32
    rounded = (first.bfloat16().float(), second.bfloat16().float())
    assert torch.equal(contrastive, nt_xent(*rounded, 0.1))
    assert torch.equal(assigned, swav_loss(*rounded, 0.1, 0.05, 3))
    assert torch.equal(predicted, byol_loss(*rounded))


def test_byol_loss_is_lightlys_and_stops_at_the_teacher() -> None:
    predicted, target = noise(8, 16, seed=1).requires_grad_(), noise(8, 16, seed=2).requires_grad_()
    loss = byol_loss(predicted, target)
    torch.testing.assert_close(loss, 2 + 2 * NegativeCosineSimilarity()(predicted, target))
    loss.backward()
    assert predicted.grad is not None
    assert target.grad is None
    assert float(byol_loss(target, 3 * target).detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_lightlys_where_theirs_is_finite(iterations: int) -> None:
    scores = torch.tanh(noise(40, 8))
    codes = sinkhorn(scores, 0.05, iterations)
    torch.testing.assert_close(
        codes, lightly_sinkhorn(scores, iterations, 0.05), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(40))
    assert torch.isfinite(sinkhorn(scores, 1e-4, iterations)).all()
    assert not torch.isfinite(lightly_sinkhorn(scores, iterations, 1e-4)).all()


def test_sinkhorn_balances_the_prototypes() -> None:
    scores = noise(64, 8) * 0.1 + torch.arange(8) * 0.1  # everyone likes the last one best
    plain = (scores / 0.05).softmax(dim=1).sum(dim=0)
    balanced = sinkhorn(scores, 0.05, 50).sum(dim=0)
    torch.testing.assert_close(balanced, torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
    assert plain.max() > 2 * balanced.max()


def test_swav_loss_is_lightlys() -> None:
    first, second = torch.tanh(noise(32, 8, seed=1)), torch.tanh(noise(32, 8, seed=2))
    theirs = SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)
    torch.testing.assert_close(
        swav_loss(first, second, 0.1, 0.05, 3), theirs([first, second], []).squeeze()
    )


# --------------------------------------------------------------------------- objectives


class Student(nn.Module):
    """A backbone with dropout and an objective, as the training task holds them."""

    def __init__(self, objective: str, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        explora = Explora(objective=objective, projection_hidden=16, projection_dim=8, prototypes=6)
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 10)
        )
        self.objective: Objective = build_objective(explora, 10)
        self.teacher = deepcopy(self.backbone).requires_grad_(requires_grad=False).eval()

    def forward(self, images: torch.Tensor, chunks: int = 1) -> torch.Tensor:
        """Images [N, 2, 3, 2, 2]."""
        flat = images.flatten(0, 1)
        features = cached_features(self.backbone, flat, chunks).unflatten(0, (-1, 2))
        with torch.no_grad():
            teacher = cached_features(self.teacher, flat, chunks).unflatten(0, (-1, 2))
        return self.objective.loss(
            (features[:, 0], features[:, 1]), (teacher[:, 0], teacher[:, 1]), gather=True
        )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_trained_parameter_of_an_objective_gets_a_gradient(objective: str) -> None:
    student = Student(objective)
    student(noise(16, 2, 3, 2, 2)).backward()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert gradients(student).keys() == trained
    # What a constant is added to before a softmax or a norm may have none, but nothing else.
    assert all(float(g.abs().max()) > 0 for g in gradients(student).values())
    assert student.objective.needs_teacher == ("byol" in objective)


def test_byol_predicts_the_teachers_embedding_of_the_other_view() -> None:
    objective = Student("byol").objective
    assert isinstance(objective, BYOL)
    with torch.no_grad():  # a teacher that is not the student
        for parameter in objective.teacher.parameters():
            parameter.add_(0.3 * noise(*parameter.shape, seed=5))
    views = noise(16, 10, seed=1), noise(16, 10, seed=2)
    targets = noise(16, 10, seed=3), noise(16, 10, seed=4)

    def apart(student: int, teacher: int) -> torch.Tensor:
        """Equation 2 of the paper for one direction: |q/|q| - z/|z||² over images."""
        with torch.no_grad():
            q = objective.predictor(objective.projection(views[student]))
            z = objective.teacher(targets[teacher])
            unit = q / q.norm(dim=1, keepdim=True) - z / z.norm(dim=1, keepdim=True)
            return unit.square().sum(1).mean()

    loss = objective.loss(views, targets)
    torch.testing.assert_close(loss, apart(0, 1) + apart(1, 0), rtol=1e-4, atol=1e-5)
    assert abs(float(loss.detach() - apart(0, 0) - apart(1, 1))) > 0.01


def test_the_combined_objective_is_the_sum_of_its_parts() -> None:
    student = Student("byol_swav")
    first, second = noise(16, 10, seed=1), noise(16, 10, seed=2)
    parts = list(student.objective.parts)  # type: ignore[arg-type]
    expected = sum(part.loss((first, second), (second, first)) for part in parts)
    torch.testing.assert_close(student.objective.loss((first, second), (second, first)), expected)
    assert len(student.objective.embeddings(first)) == 2


def test_byol_without_a_teachers_features_is_refused() -> None:
    student = Student("byol")
    with pytest.raises(ValueError, match="teacher"):
        student.objective.loss((noise(4, 10), noise(4, 10)))


def test_the_teacher_is_a_moving_average_of_what_is_trained() -> None:
    student = nn.Linear(3, 3)
    student.bias.requires_grad_(requires_grad=False)
    teacher = deepcopy(student)
    before = deepcopy(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    move_average(teacher, student, 0.75)
    torch.testing.assert_close(teacher.weight, before["weight"] + 0.25)
    assert torch.equal(teacher.bias, before["bias"])


def test_byols_own_teacher_follows_and_is_never_trained() -> None:
    objective = build_objective(Explora(objective="byol"), 10)
    assert isinstance(objective, BYOL)
    before = deepcopy(objective.teacher.state_dict())
    with torch.no_grad():
        objective.projection[0].bias.add_(1)
    objective.update_teacher(0.9)
    torch.testing.assert_close(objective.teacher[0].bias, before["0.bias"] + 0.1)
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_the_teachers_decay_rises_to_one() -> None:
    decays = [teacher_decay(0.9, step, 10) for step in range(11)]
    assert decays[0] == pytest.approx(0.9)
    assert decays[5] == pytest.approx(0.95)
    assert decays[10] == 1
    assert decays == sorted(decays)


# --------------------------------------------------------------------------- gradient cache


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunks", [2, 4])
def test_the_gradient_cache_gives_the_gradient_of_the_whole_batch(
    objective: str, chunks: int
) -> None:
    images = noise(16, 2, 3, 2, 2)
    whole, cached = Student(objective), Student(objective)
    torch.testing.assert_close(whole(images), cached(images, chunks))
    whole(images).backward()
    cached(images, chunks).backward()
    expected = gradients(whole)
    for name, gradient in gradients(cached).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_the_gradient_cache_repeats_the_dropout_masks() -> None:
    """The masks of chunks that all keep their activations, drawn in the same order."""
    images = noise(16, 2, 3, 2, 2)
    plain, cached = Student("simclr", dropout=0.5), Student("simclr", dropout=0.5)
    torch.manual_seed(11)
    flat = images.flatten(0, 1)
    features = torch.cat([plain.backbone(chunk) for chunk in flat.chunk(4)]).unflatten(0, (-1, 2))
    plain.objective.loss((features[:, 0], features[:, 1])).backward()
    torch.manual_seed(11)
    loss = cached(images, 4)
    torch.rand(7)  # whatever else draws before the second pass
    after = torch.get_rng_state()
    loss.backward()
    assert torch.equal(after, torch.get_rng_state())
    expected = gradients(plain)
    assert float(expected["backbone.1.weight"].abs().max()) > 0
    for name, gradient in gradients(cached).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def kept_for_backward(chunks: int) -> set[tuple[int, ...]]:
    """Shapes of what the forward pass keeps for the backward pass."""
    student, kept = Student("simclr"), set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cached_features(student.backbone, noise(64, 3, 2, 2), chunks)
    return kept


def test_the_gradient_cache_keeps_the_images_and_no_activations() -> None:
    assert kept_for_backward(1) > {(64, 12), (64, 16)}
    assert kept_for_backward(4) == {(16, 3, 2, 2)}


def test_the_gradient_cache_refuses_batch_statistics() -> None:
    tiny = ARCHITECTURES["street_resnet_tiny"]
    backbone = build_backbone(tiny.timm_name, tiny.arguments)
    with pytest.raises(UserError, match=r"gradient_cache_chunks .*freeze_norm"):
        refuse_batch_statistics(backbone.train())
    refuse_batch_statistics(backbone.eval())
    images = noise(4, 3, 32, 32)
    expected = backbone(images)
    torch.testing.assert_close(cached_features(backbone, images, 2), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- ranks


def gradients_of_a_rank() -> dict[tuple[str, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Loss over all ranks and DDP's gradients on one half of the images, by objective and chunks."""
    dist.init_process_group("gloo")
    start = 8 * dist.get_rank()
    found = {}
    for objective in OBJECTIVES:
        for chunks in (1, 2):
            student = Student(objective)
            parallel = DistributedDataParallel(student)
            loss = parallel(noise(16, 2, 3, 2, 2)[start : start + 8], chunks)
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            found[objective, chunks] = (total / 2, gradients(student))
    dist.destroy_process_group()
    return found


def test_two_ranks_have_the_gradient_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    ranks = run_ranks(gradients_of_a_rank, folder=tmp_path)
    for objective, chunks in ranks[0]:
        student = Student(objective)
        expected_loss = student(noise(16, 2, 3, 2, 2))
        expected_loss.backward()
        expected = gradients(student)
        for rank in ranks:
            loss, gradient = rank[objective, chunks]
            torch.testing.assert_close(loss, expected_loss.detach())
            assert gradient.keys() == expected.keys()
            for name, value in gradient.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- measures


def test_alignment_and_uniformity_are_their_definitions() -> None:
    first, second = noise(12, 5, seed=1).numpy(), noise(12, 5, seed=2).numpy()
    a = first / np.linalg.norm(first, axis=1, keepdims=True)
    b = second / np.linalg.norm(second, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(12) for j in range(i)]
    near = [math.exp(-2 * float(((a[i] - a[j]) ** 2).sum())) for i, j in pairs]
    expected = np.mean([((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)])
    first, second = torch.from_numpy(first), torch.from_numpy(second)
    assert alignment(first, second) == pytest.approx(expected)
    assert uniformity(first) == pytest.approx(math.log(np.mean(near)), rel=1e-6)
    assert alignment(first, 5 * first) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.ones(6, 4)) == pytest.approx(0, abs=1e-12)


def test_rankme_counts_directions() -> None:
    values = np.linalg.svd(noise(50, 8).double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rankme(noise(50, 8)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rankme(noise(64, 3) @ noise(3, 40, seed=1)) < 3.1
    assert rankme(torch.ones(64, 16)) == pytest.approx(1, abs=1e-3)


def test_collapse_is_told_from_health() -> None:
    healthy, constant = noise(256, 32), torch.ones(256, 32) + 1e-4 * noise(256, 32)
    line = noise(256, 1) @ noise(1, 32, seed=1)
    assert spread(healthy) == pytest.approx(1, abs=0.05)
    assert spread(constant) < COLLAPSE_SPREAD < spread(healthy)
    assert rankme(line) < COLLAPSE_RANK < rankme(healthy)
