"""Groups, AdamW and Muon as one optimiser, the gradient filter, the schedule."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from streetvision.core.errors import UserError
from streetvision.core.params import TrainLora
from streetvision.models.backbone import ARCHITECTURES
from streetvision.models.optim import (
    GradientFilter,
    Group,
    make_optimiser,
    parameter_groups,
    warmup_cosine,
)
from streetvision.models.peft import add_adapters

RATES = {"learning_rate": 0.01, "head_factor": 3.0, "layer_decay": 0.7, "weight_decay": 0.05}
TINY_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32}
TINY_RESNET = dict(ARCHITECTURES["street_resnet_tiny"].arguments)


def build(name: str = "vit_tiny_patch16_224", **changes: Any) -> tuple[nn.Module, nn.Module]:
    """A backbone and a head of one logit."""
    torch.manual_seed(0)
    arguments = TINY_RESNET if name == "resnet18" else TINY_VIT
    backbone = timm.create_model(name, num_classes=0, **arguments, **changes)
    return backbone, nn.Linear(backbone.num_features, 1)


def grouped(backbone: nn.Module, head: nn.Module, **changes: float) -> list[Group]:
    return parameter_groups(backbone, head, **{**RATES, **changes})


def by_name(groups: list[Group], *modules: nn.Module) -> dict[str, tuple[float, float, bool]]:
    listed = [(id(p), group) for group in groups for p in group["params"]]
    assert len({key for key, _ in listed}) == len(listed)
    names = {id(p): n for module in modules for n, p in module.named_parameters()}
    return {
        names[key]: (group["lr"], group["weight_decay"], group.get("hidden", False))
        for key, group in listed
        if key in names
    }


# --------------------------------------------------------------------------- groups


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "resnet18"])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_the_groups_are_timms(name: str, decay: float) -> None:
    arguments = TINY_RESNET if name == "resnet18" else TINY_VIT
    whole = timm.create_model(name, num_classes=1, **arguments)
    # timm does not exempt tokens by itself.
    exempt = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()
    theirs = param_groups_layer_decay(whole, 0.05, exempt, layer_decay=decay)
    for group in theirs:
        group["lr"] = 0.01 * group["lr_scale"]
    backbone, head = build(name)
    ours = by_name(grouped(backbone, head, layer_decay=decay, head_factor=1.0), backbone)
    wanted = by_name(theirs, whole)
    assert ours.keys() < wanted.keys()
    for key, (rate, weight_decay, _) in ours.items():
        assert (rate, weight_decay) == pytest.approx(wanted[key][:2]), key


def test_the_rates_fall_from_head_to_stem() -> None:
    backbone, head = build(class_token=True, reg_tokens=2)
    found = by_name(grouped(backbone, head), backbone)
    assert found["norm.bias"][0] == found["blocks.2.mlp.fc1.weight"][0] == pytest.approx(0.007)
    assert found["blocks.0.mlp.fc1.weight"][0] == pytest.approx(0.01 * 0.7**3)
    for stem in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight"):
        assert found[stem][0] == pytest.approx(0.01 * 0.7**4)
    assert by_name(grouped(backbone, head), head)["weight"] == (pytest.approx(0.03), 0.05, False)
    rates = [group["lr"] for group in grouped(backbone, head)]
    assert rates == sorted(rates)


def test_what_is_decayed_and_what_is_muons() -> None:
    backbone, head = build(class_token=True, reg_tokens=2, init_values=0.1)
    found = by_name(grouped(backbone, head), backbone)
    kinds = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    hidden = {f"blocks.{i}.{kind}" for i in range(3) for kind in kinds}
    assert {name for name, (*_, muons) in found.items() if muons} == hidden
    assert {n for n, (_, decay, _) in found.items() if decay} == {
        *hidden,
        "patch_embed.proj.weight",
    }


def test_adapters_get_the_rate_of_their_block_and_magnitudes_no_decay() -> None:
    for name in ("vit_tiny_patch16_224", "resnet18"):
        backbone, head = build(name)
        add_adapters(backbone, TrainLora(rank=2), dora=True)
        found = by_name(grouped(backbone, head), backbone)
        assert found
        last = max(rate for rate, *_ in found.values())
        for key, (rate, decay, hidden) in found.items():
            assert ("lora_magnitude_vector" in key) == (decay == 0), key
            assert hidden == (name != "resnet18" and decay > 0)
            if key.startswith(("blocks.2.", "layer4.")):
                assert rate == last == pytest.approx(0.007)


def test_frozen_parameters_are_in_no_group() -> None:
    backbone, head = build()
    backbone.requires_grad_(requires_grad=False)
    assert by_name(grouped(backbone, head), head).keys() == {"weight", "bias"}


def test_layer_decay_needs_known_blocks() -> None:
    backbone, head = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 1)
    assert len(grouped(backbone, head, layer_decay=1.0)) == 4
    with pytest.raises(UserError, match="are not known"):
        grouped(backbone, head)


# --------------------------------------------------------------------------- optimisers


def give_gradients(modules: tuple[nn.Module, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def values(modules: tuple[nn.Module, ...]) -> list[torch.Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_optimiser_steps_as_the_two_apart() -> None:
    together = build()
    apart = copy.deepcopy(together)
    optimiser = make_optimiser(grouped(*together), kind="muon")
    groups = grouped(*apart)
    for group in groups:
        group["lr"] *= 0.5  # as the schedule below does
    muon = torch.optim.Muon([g for g in groups if g["hidden"]], adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([g for g in groups if not g["hidden"]], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5)
    start = values(together)
    for step in range(3):
        give_gradients(together, step)
        give_gradients(apart, step)
        optimiser.step()
        schedule.step()
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
    assert same(values(together), values(apart))
    assert not any(torch.equal(a, b) for a, b in zip(start, values(together), strict=True))
    optimiser.zero_grad()
    assert all(p.grad is None for module in together for p in module.parameters())


def test_a_schedule_reaches_every_group() -> None:
    optimiser = make_optimiser(grouped(*build()), kind="muon")
    start = [group["lr"] for group in optimiser.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.0 if step else 1.0)
    assert [group["lr"] for group in optimiser.param_groups] == start
    optimiser.step()
    schedule.step()
    assert {group["lr"] for group in optimiser.param_groups} == {0.0}
    modules = build()
    still = make_optimiser(grouped(*modules, learning_rate=0.0), kind="muon")
    before = values(modules)
    give_gradients(modules, 0)
    still.step()
    assert same(values(modules), before)


def test_muon_and_adamw_resume_bit_for_bit() -> None:
    whole, resumed = build(), build()
    one = make_optimiser(grouped(*whole), kind="muon")
    for step in range(2):
        give_gradients(whole, step)
        one.step()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    for ours, theirs in zip(resumed, whole, strict=True):
        ours.load_state_dict(theirs.state_dict())
    # Everything but the state, which also holds rates and decays, differs.
    other = make_optimiser(grouped(*resumed, learning_rate=1.0, weight_decay=0.5), kind="muon")
    other.load_state_dict(torch.load(file, weights_only=True))
    for module, optimiser in ((whole, one), (resumed, other)):
        for step in (2, 3):
            give_gradients(module, step)
            optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] *= 0.1  # a schedule still reaches both after loading
        give_gradients(module, 4)
        optimiser.step()
    assert same(values(whole), values(resumed))
    parameters = sum(len(group["params"]) for group in other.param_groups)
    assert len(other.state) == len(other.state_dict()["state"]) == parameters


def test_lightning_trains_and_resumes_with_both(tmp_path: Path) -> None:
    class Task(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = build()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            loss: torch.Tensor = self.head(self.backbone(batch[0])).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            optimiser = make_optimiser(grouped(self.backbone, self.head), kind="muon")
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.8**step)
            return {
                "optimizer": optimiser,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images), 2)

    def fit(epochs: int, start: Path | None = None) -> tuple[Task, lightning.Trainer]:
        task = Task()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, loader, ckpt_path=start)
        return task, trainer

    whole, _ = fit(4)
    _, half = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, tmp_path / "half.ckpt")
    assert same(values((whole,)), values((resumed,)))
    assert not same(values((whole,)), values((Task(),)))


def test_a_closure_is_called_once_with_gradients() -> None:
    backbone, head = build()
    optimiser = make_optimiser(grouped(backbone, head, learning_rate=0.001), kind="muon")
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimiser.zero_grad()
        loss: torch.Tensor = head(backbone(torch.ones(2, 3, 32, 32))).square().mean()
        loss.backward()
        return loss

    first = optimiser.step(closure)  # type: ignore[arg-type]
    for _ in range(5):
        optimiser.step(closure)  # type: ignore[arg-type]
    assert len(calls) == 6
    assert bool(closure() < first)


def test_a_scaler_skips_steps_that_overflow() -> None:
    modules = build()
    optimiser = make_optimiser(grouped(*modules), kind="muon")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = values(modules)
    scaler.scale(torch.ones(()))
    give_gradients(modules, 0)
    next(modules[0].parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    scaler.step(optimiser)
    scaler.update()
    assert same(values(modules), before)
    give_gradients(modules, 0)
    scaler.step(optimiser)
    assert not same(values(modules), before)


def test_muon_lowers_a_loss_at_the_rate_of_adamw() -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(16) % 2).float()
    for kind in ("adamw", "muon"):
        backbone, head = build()
        groups = grouped(backbone, head, learning_rate=0.002, layer_decay=1.0)
        optimiser = make_optimiser(groups, kind=kind)  # type: ignore[arg-type]
        for _ in range(12):
            loss = nn.functional.binary_cross_entropy_with_logits(
                head(backbone(images))[:, 0], labels
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert bool(loss < 0.2), kind


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_muon_without_matrices_is_refused(name: str) -> None:
    backbone, head = build(name)
    if name != "resnet18":
        backbone.requires_grad_(requires_grad=False)
    with pytest.raises(UserError, match=r"muon trains weight matrices .* none here.*use adamw"):
        make_optimiser(grouped(backbone, head), kind="muon")
    assert isinstance(make_optimiser(grouped(backbone, head), kind="adamw"), torch.optim.AdamW)


# --------------------------------------------------------------------------- gradient filter


def slow_filter(gradients: list[np.ndarray], alpha: float, weight: float) -> list[np.ndarray]:
    average, filtered = gradients[0], []
    for gradient in gradients:
        average = alpha * average + (1 - alpha) * gradient
        filtered.append(gradient + weight * average)
    return filtered


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.99), st.floats(0, 5), st.integers(1, 6), st.integers(0, 5))
def test_the_filter_adds_the_moving_average(alpha: float, weight: float, n: int, cut: int) -> None:
    rng = np.random.default_rng(n)
    gradients = [rng.normal(size=(3, 2)) for _ in range(n)]
    never = nn.Parameter(torch.zeros(2))
    parameter = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    kept = GradientFilter([never, parameter], alpha, weight)
    for step, wanted in enumerate(slow_filter(gradients, alpha, weight)):
        if step == cut:  # a resumed run
            file = io.BytesIO()
            torch.save(kept.state_dict(), file)
            file.seek(0)
            kept = GradientFilter([never, parameter], alpha, weight)
            kept.load_state_dict(torch.load(file, weights_only=True))
        parameter.grad = torch.from_numpy(gradients[step].copy())
        kept.apply()
        np.testing.assert_allclose(parameter.grad.numpy(), wanted, rtol=1e-12, atol=1e-12)
    assert never.grad is None


def test_a_resumed_filter_is_the_same_bit_for_bit() -> None:
    def gradients(resume: bool) -> list[torch.Tensor]:
        model = nn.Linear(8, 8)
        ours = GradientFilter(model.parameters(), 0.98, 2.0)
        for step in range(6):
            give_gradients((model,), step)
            if resume and step == 3:
                state = copy.deepcopy(ours.state_dict())
                ours = GradientFilter(model.parameters(), 0.98, 2.0)
                ours.load_state_dict(state)
            ours.apply()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert same(gradients(resume=False), gradients(resume=True))


# --------------------------------------------------------------------------- schedule


def torch_schedule(steps: int, warmup: int) -> list[float]:
    """The same from torch's closed forms: linear warm-up, then cosine annealing."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedulers = torch.optim.lr_scheduler
    linear = schedulers.LinearLR(optimizer, 1 / warmup, 1.0, max(1, warmup - 1))
    factors = []
    for _ in range(min(warmup, steps)):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        linear.step()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    cosine = schedulers.CosineAnnealingLR(optimizer, max(1, steps - warmup))
    for _ in range(steps - warmup):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    return factors


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 120), st.floats(0, 0.99))
def test_the_schedule_is_torchs(steps: int, fraction: float) -> None:
    factor = warmup_cosine(steps, fraction)
    found = [factor(step) for step in range(steps)]
    warmup = max(1, round(steps * fraction))
    np.testing.assert_allclose(found, torch_schedule(steps, warmup), atol=1e-9)
    assert all(0 < value <= 1 for value in found)
    assert max(found) == 1
    assert factor(steps + 5) == pytest.approx(0, abs=1e-12)
