"""What a prediction costs, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streetvision.bundle.cost import forward_flops, prediction_cost
from streetvision.core.params import Cvfm, ViewGrid
from streetvision.data.transforms import Preprocessing
from streetvision.fusion.fusion import Fusion, FusionConfig
from streetvision.fusion.networks import build_network
from streetvision.models.backbone import build_backbone, resolve
from streetvision.models.classifier import RoadworkClassifier

PLAIN = Preprocessing(32, 48, "crop", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def vit() -> RoadworkClassifier:
    name, arguments, _, _ = resolve("street_vit", 32, 48)
    return RoadworkClassifier(build_backbone(name, arguments)).eval()


def vit_flops(tokens: int, width: int, depth: int, patch: int) -> int:
    """A multiplication and an addition are two."""
    embed = 2 * tokens * width * 3 * patch**2
    projections = 2 * tokens * width * (3 + 1 + 4 + 4) * width
    attention = 2 * 2 * tokens**2 * width
    return embed + depth * (projections + attention) + 2 * width


def test_convolutions_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 2 * 3, 5),
    )  # fmt: skip
    by_hand = 2 * (8 * 4 * 5 * 27 + 6 * 2 * 3 * (4 * 9) + 36 * 5)
    assert forward_flops(network, torch.zeros(1, 3, 8, 10, device="meta")) == by_hand


def test_a_model_that_needs_numbers_is_run() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            size = int(images.sum().item()) + 2
            return self.layer(images.mean(dim=(2, 3)).repeat(size, 1))

    assert forward_flops(Odd(), torch.zeros(1, 3, 8, 8, device="meta")) == 2 * 2 * 3 * 4


def test_a_transformer_by_hand() -> None:
    model = vit()
    fusion = Fusion(FusionConfig.of("single", Cvfm(), ViewGrid(), 0))
    found = prediction_cost(model, PLAIN, fusion, second_pass=False)
    flops = vit_flops(tokens=6, width=64, depth=4, patch=16)
    assert found == {
        "parameters": sum(p.numel() for p in model.parameters()), "fusion_parameters": 0,
        "flops_per_view": flops, "views": 1, "flops": flops, "views_easy": 1, "flops_easy": flops,
    }  # fmt: skip
    # A second pass of a single view is none.
    assert prediction_cost(model, PLAIN, fusion, second_pass=True) == found


@pytest.mark.parametrize("second_pass", [False, True])
def test_views_and_fusion_are_counted(second_pass: bool) -> None:
    model = vit()
    grid = ViewGrid(grid=2, flip=True)
    flops = vit_flops(6, 64, 4, 16)
    mean = Fusion(FusionConfig.of("simple_mean", Cvfm(), grid, 0))
    found = prediction_cost(model, PLAIN, mean, second_pass=second_pass)
    views = 10 + second_pass
    assert (found["views"], found["flops"]) == (views, views * flops)
    easy = (1, flops) if second_pass else (10, 10 * flops)
    assert (found["views_easy"], found["flops_easy"]) == easy
    # Two logistic regressions on two feature vectors and three terms, standardised: means and deviations.
    config = FusionConfig.of("mlp", Cvfm(fits=2, hidden_layers=0), grid, 64)
    trained = Fusion(config, build_network(config, None))
    fused = prediction_cost(model, PLAIN, trained, second_pass=second_pass)
    weights = 2 * 64 + 3
    assert fused["fusion_parameters"] == 2 * (weights + 1 + 2 * weights)
    means = 2 * 2 * 64 * 10 + 3 * 2 * 10  # of features, and of logits
    at_least = 2 * 2 * weights
    assert at_least <= fused["flops"] - views * flops <= at_least + 2 * 2 * means
