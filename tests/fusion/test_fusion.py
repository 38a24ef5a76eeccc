"""Fusion: each rule against its slow obvious version, the networks against oracles and their promises."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, ViewGrid
from streetvision.data.views import ViewScores, view_names
from streetvision.decision.calibrators import Platt
from streetvision.decision.inputs import sigmoid
from streetvision.fusion import fitting as fusion_training
from streetvision.fusion.fitting import (
    FusionFit,
    LabelledViews,
    choose_fusion,
    drop_views,
    fit_fusion,
)
from streetvision.fusion.fusion import (
    ENTROPY_FLOOR,
    MODES,
    TRAINED,
    UNTRAINED,
    WEIGHTS,
    Fusion,
    FusionConfig,
    is_tile,
    load_fusion,
    save_fusion,
)
from streetvision.fusion.networks import (
    AverageFusion,
    FusionNetwork,
    LatentFusion,
    Scale,
    ViewTensors,
    attend,
    build_network,
    freeze_head,
    logit_terms,
    masked_mean,
    pick_kernel,
    view_tensors,
)
from streetvision.stats.metrics import all_metrics

GRID = ViewGrid(grid=2)
D = 6
QUICK = Cvfm(
    fits=1, epochs=30, latent_dim=4, attention_dim=8, attention_heads=2, weight_decay=0.01
)  # fmt: skip


def grid_boxes(grid: ViewGrid, n: int) -> NDArray[np.float64]:
    """Boxes [N, V, 4] of tiles without growth."""
    side = 1 / grid.grid
    cells = product(range(grid.grid), repeat=2) if grid.grid > 1 else ()
    tiles = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r, c in cells]
    boxes = np.array([(0, 0, 1, 1), *tiles] * (2 if grid.flip else 1), dtype=np.float64)
    return np.tile(boxes, (n, 1, 1))


def sample(n: int = 300, seed: int = 0, grid: ViewGrid = GRID) -> LabelledViews:
    """The evidence is in one tile only: its first two features; the head sees the first."""
    rng = np.random.default_rng(seed)
    views = len(view_names(grid))
    labels = (np.arange(n) % 2).astype(np.int64)
    features = rng.normal(size=(n, views, D)).astype(np.float16)
    where = rng.integers(1, views, n) if views > 1 else np.zeros(n, int)
    features[np.arange(n), where, :2] += (2.5 * labels)[:, None].astype(np.float16)
    features[:, 0, :2] += (0.8 * labels)[:, None].astype(np.float16)
    content = np.full((n, views), 48 * 64)
    content[:, 1::2] = 1000
    logits = apply_head(features)
    groups = np.arange(n) // 2 % 12
    return LabelledViews(ViewScores(logits, features, content, grid_boxes(grid, n)), labels, groups)


def make_head() -> nn.Linear:
    head = nn.Linear(D, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.5, 0.2, 0, 0, 0, 0.1]]))
        head.bias.fill_(-0.4)
    return head


def apply_head(features: NDArray[Any]) -> NDArray[np.float64]:
    with torch.no_grad():
        return make_head().double()(torch.from_numpy(features).double()).squeeze(-1).numpy()


def tensors(scores: ViewScores, dtype: torch.dtype = torch.float64) -> ViewTensors:
    assert scores.features is not None
    return view_tensors(scores.logits, scores.features, scores.content > 0, scores.boxes, dtype)


def rule(mode: str, grid: ViewGrid = GRID, **options: float) -> Fusion:
    return Fusion(FusionConfig.of(mode, Cvfm(**options), grid, 0))


def fit(
    mode: str, train: LabelledViews | None = None, head: nn.Module | None = None, **options: Any
) -> FusionFit:
    chosen, head = QUICK.model_copy(update=options), head or make_head()
    return fit_fusion(mode, chosen, GRID, train or sample(), sample(200, 1), head, seed=7)


# --------------------------------------------------------------------------- rules


logit_rows = st.lists(st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(logit_rows, st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.2, 5))
def test_rules_against_the_slow_obvious_versions(
    rows: list[list[float]], seed: int, k: int, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = np.array(rows)
    content = rng.integers(0, 4, logits.shape) * 500
    content[:, 0] = 3000
    boxes = grid_boxes(GRID, len(rows))
    found = {
        mode: rule(mode, top_k=k, temperature=temperature).fuse(logits, None, content, boxes)
        for mode in UNTRAINED
    }
    for row, z in enumerate(rows):
        there = [v for v in range(5) if content[row, v] > 0]
        tiles = sorted((z[v] for v in there if v > 0), reverse=True)[:k]

        def weight(v: int, z: list[float] = z) -> float:
            p = 1 / (1 + math.exp(-z[v] / temperature))
            q = 1 / (1 + math.exp(z[v] / temperature))
            entropy = -sum(x * math.log(x) for x in (p, q) if x > 0)
            return 1 / (ENTROPY_FLOOR + entropy)

        expected = {
            "single": z[0],
            "simple_mean": sum(z[v] for v in there) / len(there),
            "topk_mean": (z[0] + sum(tiles)) / (1 + len(tiles)),
            "weighted_uncertainty": sum(weight(v) * z[v] for v in there)
            / sum(weight(v) for v in there),
            "content_aware": sum(int(content[row, v]) * z[v] for v in there)
            / sum(int(content[row, v]) for v in there),
        }
        for mode in UNTRAINED:
            assert found[mode][row] == pytest.approx(expected[mode], abs=1e-9), mode


def test_content_aware_is_the_mean_only_where_all_contents_are_equal() -> None:
    scores = sample(50).scores
    equal = np.full_like(scores.content, 3072)
    mean = rule("simple_mean").fuse(scores.logits, None, equal, scores.boxes)
    aware = rule("content_aware")
    np.testing.assert_allclose(aware.fuse(scores.logits, None, equal, scores.boxes), mean)
    other = equal.copy()
    other[:, 2] -= 1
    found = aware.fuse(scores.logits, None, other, scores.boxes)
    assert (found != mean).all()


def test_a_hot_temperature_makes_all_views_equal_and_a_cold_one_favours_the_sure() -> None:
    scores = sample(50).scores
    mean = rule("simple_mean").fuse(*scores)
    hot = rule("weighted_uncertainty", temperature=1e4).fuse(*scores)
    np.testing.assert_allclose(hot, mean, atol=1e-5)
    z = np.array([[0.1, 6.0, 0.0, 0.0, 0.0]])
    arguments = (z, None, np.ones((1, 5)), grid_boxes(GRID, 1))
    assert rule("weighted_uncertainty").fuse(*arguments)[0] > 2 * z.mean()


@pytest.mark.parametrize("mode", UNTRAINED)
def test_views_in_any_order_of_tiles_and_absent_views(mode: str) -> None:
    scores = sample(40).scores
    fusion = rule(mode)
    before = fusion.fuse(*scores)
    order = [0, 3, 1, 4, 2]
    moved = [part[:, order] for part in (scores.logits, scores.content, scores.boxes)]
    np.testing.assert_allclose(fusion.fuse(moved[0], None, *moved[1:]), before)
    # A view without content is no view, whatever its logit.
    content = scores.content.copy()
    content[:, 4] = 0
    wild = scores.logits.copy()
    wild[:, 4] = 1e6
    without = fusion.fuse(wild, None, content, scores.boxes)
    fewer = fusion.fuse(scores.logits[:, :4], None, content[:, :4], scores.boxes[:, :4])
    np.testing.assert_allclose(without, fewer)
    # The global view alone is the single view, in every rule.
    content[:, 1:] = 0
    np.testing.assert_allclose(fusion.fuse(wild, None, content, scores.boxes), wild[:, 0])


def test_a_mirrored_global_view_is_global() -> None:
    boxes = grid_boxes(ViewGrid(grid=2, flip=True), 1)
    assert is_tile(boxes)[0].tolist() == [False, *[True] * 4] * 2
    z = np.array([[1.0, 0, 0, 0, 9.0, 3.0, 0, 0, 0, 0]])
    fused = rule("topk_mean", top_k=1).fuse(z, None, np.ones((1, 10)), boxes)
    assert fused[0] == pytest.approx((2.0 + 9.0) / 2)


def test_bad_arguments_are_named() -> None:
    scores = sample(4).scores
    with pytest.raises(UserError, match=r"\[N, V\]"):
        rule("simple_mean").fuse(scores.logits[:, 0], None, scores.content, scores.boxes)
    with pytest.raises(UserError, match="no global view"):
        rule("simple_mean").fuse(scores.logits, None, 0 * scores.content, scores.boxes)
    trained = fit("mlp", epochs=1).fusion
    with pytest.raises(UserError, match="mlp needs features"):
        trained.fuse(scores.logits, None, scores.content, scores.boxes)
    assert scores.features is not None
    with pytest.raises(UserError, match=r"features \[N, V, 6\]; got \(4, 5, 3\)"):
        trained.fuse(scores.logits, scores.features[:, :, :3], scores.content, scores.boxes)
    with pytest.raises(UserError, match="takes 5 views, got 3"):
        trained.fuse(scores.logits[:, :3], scores.features[:, :3], scores.content[:, :3],
                     scores.boxes[:, :3])  # fmt: skip
    assert len(trained.fuse(*(part[:0] for part in scores if part is not None))) == 0


# --------------------------------------------------------------------------- starts and oracles


def start_of(mode: str, part: LabelledViews) -> FusionNetwork:
    network = build_network(FusionConfig.of(mode, QUICK, GRID, D), freeze_head(make_head()))
    network.fit_start(tensors(part.scores, torch.float32), torch.Generator().manual_seed(1))
    return network.double()


def test_latent_starts_as_the_mean_of_the_views() -> None:
    network = start_of("latent", sample())
    scores = sample(60, 3).scores
    with torch.no_grad():
        fused = network(tensors(scores)).numpy()
    np.testing.assert_allclose(fused, rule("simple_mean").fuse(*scores), atol=2e-5)


@pytest.mark.parametrize("mode", ["mlp", "attention"])
def test_the_others_start_without_an_opinion(mode: str) -> None:
    with torch.no_grad():
        assert (start_of(mode, sample())(tensors(sample(60, 3).scores)) == 0).all()


def test_mlp_without_hidden_layers_is_penalised_logistic_regression(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = sample(200)
    options = QUICK.model_copy(
        update={"epochs": 60, "patience_epochs": 60, "weight_decay": 0.05, "view_dropout": 0.0}
    )
    # The last epoch counts: the penalised optimum, which is not where VAL_SELECT would stop.
    falling = itertools.count(0, -1)
    monkeypatch.setattr(fusion_training, "_log_loss", lambda *_: float(next(falling)))
    found = fit_fusion("mlp", options, GRID, train, train, None, seed=7)
    scores = train.scores
    assert scores.features is not None
    features = scores.features.astype(np.float64)
    top = np.sort(scores.logits[:, 1:], axis=1)[:, -3:].mean(1)
    terms = np.stack([scores.logits[:, 0], scores.logits[:, 1:].mean(1), top], axis=1)
    x = np.concatenate([features[:, 0], features[:, 1:].mean(1), terms], axis=1)
    oracle = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / (0.05 * len(x)), tol=1e-8, max_iter=1000)
    ).fit(x, train.labels)
    fused, expected = found.fusion.fuse(*scores), oracle.decision_function(x)
    print(f"largest difference from scikit-learn's logit {np.abs(fused - expected).max():.1e}")
    # In float32 the objective, about 0.5, is known to 6e-8; at a curvature of 0.05, which weight decay
    # gives, a weight may be off by sqrt(2 · 6e-8 / 0.05) = 1.5e-3, and so a logit by several times that.
    np.testing.assert_allclose(fused, expected, atol=5e-3, rtol=0)
    assert np.abs(expected).max() > 2


def test_scale_is_scikit_learns_standard_scaler() -> None:
    values = np.random.default_rng(0).normal(3, 2, (5, 4))  # few rows: n - 1 would be seen
    values[:, 2] = 1.5
    scale = Scale(4).double()
    scale.fit(torch.from_numpy(values))
    np.testing.assert_allclose(
        scale(torch.from_numpy(values)),
        StandardScaler().fit_transform(values),
        rtol=1e-9,
        atol=1e-9,
    )
    np.testing.assert_allclose(scale.deviation[[0, 1, 3]], values.std(axis=0, ddof=0)[[0, 1, 3]])
    assert scale.deviation[2] == 1.0


@pytest.mark.parametrize("mode", TRAINED)
def test_scales_are_those_of_the_views_that_exist(mode: str) -> None:
    part = sample(60)
    assert part.scores.features is not None
    content, features = part.scores.content.copy(), part.scores.features.copy()
    content[:40, 2] = 0
    content[:10, 1:] = 0  # not a tile
    there = content > 0
    features[~there] = 1e3
    scores = part.scores._replace(features=features, content=content)
    network = start_of(mode, LabelledViews(scores, part.labels, part.groups))
    values = features.astype(np.float64)
    tiles = [
        values[row, 1:][there[row, 1:]].mean(axis=0) for row in range(60) if there[row, 1:].any()
    ]
    expected = (
        {"scale_global": values[:, 0], "scale_tiles": np.array(tiles)}
        if mode == "mlp"
        else {"scale": values[there]}
    )
    for name, rows in expected.items():
        scale, oracle = network.get_submodule(name), StandardScaler().fit(rows)
        np.testing.assert_allclose(scale.mean, oracle.mean_, atol=1e-5)
        np.testing.assert_allclose(scale.deviation, oracle.scale_, rtol=1e-5)


def test_logit_terms_by_hand() -> None:
    scores = sample(20).scores
    content = scores.content.copy()
    content[:5, 1:] = 0
    content[5:9, 2] = 0
    found = logit_terms(tensors(scores._replace(content=content))).numpy()
    for row in range(20):
        z, there = scores.logits[row], [v for v in range(1, 5) if content[row, v] > 0]
        tiles = [z[v] for v in there] or [z[0]]
        expected = [z[0], np.mean(tiles), np.mean(sorted(tiles)[-3:])]
        np.testing.assert_allclose(found[row], expected)


def test_latent_by_hand() -> None:
    fitted = fit("latent")
    network = fitted.fusion.network
    assert isinstance(network, LatentFusion)
    scores = sample(6, 5).scores
    assert scores.features is not None
    present = scores.content > 0
    present[0, 3] = False
    views = view_tensors(scores.logits, scores.features, present, scores.boxes, torch.float64)
    with torch.no_grad():
        fused, weights, decoded = network.fuse_features(views)
    state = {k: v.numpy() for k, v in network.state_dict().items()}
    assert fused.shape == (6, D)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert weights[0, 3] == 0
    for row in range(6):
        there = np.flatnonzero(present[row])
        raw = np.exp(state["view_logits"][there])
        weight = raw / raw.sum()
        latent = np.zeros(4)
        for v, w in zip(there, weight, strict=True):
            x = (scores.features[row, v] - state["scale.mean"]) / state["scale.deviation"]
            h = state["encoder.weight"] @ x + state["encoder.bias"]
            inner = torch.from_numpy(state["inner.weight"] @ h + state["inner.bias"])
            h = h + state["outer.weight"] @ nn.functional.gelu(inner).numpy() + state["outer.bias"]
            latent += w * h
        out = np.zeros(D)
        for v, w in zip(there, weight, strict=True):
            part = state["decoders"][v] @ latent + state[f"biases.{v}"]
            np.testing.assert_allclose(decoded[row, v], part, atol=1e-9)
            out += w * part
        out = out * state["scale.deviation"] + state["scale.mean"]
        np.testing.assert_allclose(fused[row], out, atol=1e-9)
    np.testing.assert_allclose(np.unique(weights[1:].numpy(), axis=0).shape, (1, 5))
    assert weights[1].std() > 1e-3, "the view weights were not learnt"


def test_the_loss_of_latent_has_a_reconstruction_term() -> None:
    network = fit("latent").fusion.network
    assert isinstance(network, LatentFusion)
    part = sample(30, 9)
    content = part.scores.content.copy()
    content[:20, 2:] = (
        0  # views that are absent, whatever their features are, are not to be rebuilt
    )
    views = tensors(part.scores._replace(content=content))
    views.features[~views.present] = 1e3
    y = torch.as_tensor(part.labels, dtype=torch.float64)
    with torch.no_grad():
        _, _, decoded = network.fuse_features(views)
        errors = [
            float(((decoded[n, v] - network.scale(views.features[n, v])) ** 2).mean())
            for n in range(30)
            for v in range(5)
            if content[n, v] > 0
        ]
        error = sum(errors) / len(errors)
        total = float(network.loss(views, y))
        entropy = float(nn.functional.binary_cross_entropy_with_logits(network(views), y))
    assert error > 0.01
    assert total == pytest.approx(entropy + 0.1 * error)


def attention_inputs(device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 2, 5, 16, generator=generator).to(device) for _ in range(3)]
    bias = torch.randn(3, 2, 5, 5, generator=generator)
    bias[0, :, :, 3] = -torch.inf
    return made, bias.to(device)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_kernels_give_the_same_numbers() -> None:
    made, bias = attention_inputs("cpu")
    scores = torch.einsum("nhqd,nhkd->nhqk", made[0], made[1]) / 4 + bias
    slow = torch.einsum("nhqk,nhkd->nhqd", scores.softmax(-1), made[2])
    torch.testing.assert_close(attend(*made, bias, "sdpa"), slow)
    torch.testing.assert_close(attend(*made, bias, "flex"), slow)
    # On a CPU FlexAttention has no gradient.
    assert pick_kernel(made[0]) == "sdpa"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled FlexAttention needs a GPU")
def test_attention_kernels_give_the_same_gradients() -> None:
    results = []
    for kernel in ("sdpa", "flex"):
        made, bias = attention_inputs("cuda")
        leaves = [part.requires_grad_() for part in (*made, bias)]
        attend(*made, bias, kernel).square().sum().backward()  # type: ignore[arg-type]
        results.append([leaf.grad for leaf in leaves])
    for sdpa, flex in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, flex, rtol=1e-3, atol=1e-3)


def test_attention_sees_places() -> None:
    network = build_network(FusionConfig.of("attention", QUICK, GRID, D), None).double()
    with torch.no_grad():
        network.bias.weight.normal_()  # type: ignore[union-attr,operator]
        network.output.weight.normal_()  # type: ignore[union-attr,operator]
    scores = sample(8).scores
    assert scores.features is not None
    arrays = (scores.logits, scores.features, scores.content > 0)
    before = network.fuse_arrays(*arrays, scores.boxes)
    swapped = network.fuse_arrays(*arrays, scores.boxes[:, [0, 4, 2, 3, 1]])
    assert np.abs(swapped - before).max() > 1e-3
    # Geometry is relative to the global view: another frame in the image changes nothing.
    moved = scores.boxes * 0.5 + [0.25, 0.1, 0.25, 0.1]
    np.testing.assert_allclose(network.fuse_arrays(*arrays, moved), before)


# --------------------------------------------------------------------------- fitting


@pytest.mark.parametrize("mode", TRAINED)
def test_trained_modes_find_what_the_single_view_misses(mode: str) -> None:
    fitted = fit(mode)
    test = sample(400, 11)
    fused = fitted.fusion.fuse(*test.scores)
    single = rule("single").fuse(*test.scores)
    assert loss(fused, test.labels) < loss(single, test.labels) - 0.05
    (epoch,), (losses,) = fitted.epochs, fitted.log_losses
    assert epoch > 0
    assert losses[epoch] == min(losses)


def loss(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return float(all_metrics(labels, 1 / (1 + np.exp(-logits)))["log_loss"])


@pytest.mark.parametrize("mode", TRAINED)
def test_fitting_is_deterministic_by_seed(mode: str) -> None:
    train, select, head = sample(), sample(200, 1), make_head()
    options = QUICK.model_copy(update={"epochs": 3})
    state = torch.random.get_rng_state()
    first = fit_fusion(mode, options, GRID, train, select, head, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(99)
    second = fit_fusion(mode, options, GRID, train, select, head, seed=7)
    assert first.log_losses == second.log_losses
    scores = sample(50, 4).scores
    np.testing.assert_array_equal(first.fusion.fuse(*scores), second.fusion.fuse(*scores))
    other = fit_fusion(mode, options, GRID, train, select, head, seed=8)
    assert other.log_losses != first.log_losses


@pytest.mark.parametrize("mode", TRAINED)
def test_only_fusion_parameters_learn(mode: str) -> None:
    head = make_head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    network = fit(mode, head=head).fusion.network
    assert network is not None
    assert all(torch.equal(head.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in head.parameters()), "the caller's head was frozen"
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == ({"head.weight", "head.bias"} if mode == "latent" else set())
    assert not [name for name in network.trainable() if "head" in name.split(".")[0]]


@pytest.mark.parametrize("mode", TRAINED)
def test_several_networks_are_averaged_and_each_leaves_other_groups_out(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = sample(), sample(50, 4)
    seen: list[tuple[int, ...]] = []
    rows = ViewTensors.rows
    monkeypatch.setattr(
        ViewTensors, "rows", lambda self, index: seen.append(tuple(index)) or rows(self, index)
    )
    fitted = fit(mode, train, fits=3, epochs=4)
    network = fitted.fusion.network
    assert isinstance(network, AverageFusion)
    assert len(network.members) == len(fitted.epochs) == len(fitted.log_losses) == 3
    left_out = [set(train.groups) - set(train.groups[list(index)]) for index in seen]
    assert all(left_out)
    assert len(set.union(*left_out)) == sum(map(len, left_out)), "a group was left out twice"
    for index, groups in zip(seen, left_out, strict=True):
        assert len(index) == (~np.isin(train.groups, list(groups))).sum()
    one_by_one = [
        Fusion(replace(fitted.fusion.config, options=fitted.fusion.config.options | {"fits": 1}), m)
        .fuse(*test.scores) for m in network.members  # type: ignore[arg-type, operator]
    ]  # fmt: skip
    assert np.abs(one_by_one[0] - one_by_one[1]).max() > 1e-3
    np.testing.assert_allclose(fitted.fusion.fuse(*test.scores), np.mean(one_by_one, axis=0))


def test_with_too_few_groups_to_leave_out_one_network_is_fitted() -> None:
    train = sample()
    alone = fit("mlp", replace(train, groups=np.zeros(300, int)), fits=3, epochs=2)
    assert alone.epochs == fit("mlp", train, fits=1, epochs=2).epochs
    assert alone.fusion.config.options["fits"] == 1


def test_an_average_varies_less_with_the_groups_than_one_network() -> None:
    """Half of the groups have a direction of their own, and chance decides which are there to fit on."""
    test = sample(300, 11)

    def losses(fits: int) -> list[float]:
        found = []
        for draw in range(6):
            rng = np.random.default_rng(draw)
            train = sample(60, 100 + draw)
            features = train.scores.features
            assert features is not None
            own = rng.normal(size=(12, 1, D)) * rng.integers(0, 2, (12, 1, 1)) * 2
            moved = features + own[train.groups] * (2 * train.labels - 1)[:, None, None]
            scores = train.scores._replace(features=moved.astype(np.float16))
            fused = fit("mlp", replace(train, scores=scores), fits=fits).fusion.fuse(*test.scores)
            found.append(loss(fused, test.labels))
        return found

    assert np.std(losses(5)) < np.std(losses(1))


def test_something_frozen_that_changes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LatentFusion.loss

    def meddling(self: LatentFusion, *arguments: Any) -> torch.Tensor:
        with torch.no_grad():
            next(self.head.parameters()).add_(1.0)
        return real(self, *arguments)

    monkeypatch.setattr(LatentFusion, "loss", meddling)
    with pytest.raises(RuntimeError, match="frozen"):
        fit("latent", epochs=1)


@pytest.mark.parametrize("mode", TRAINED)
def test_any_number_of_views_works_after_view_dropout(mode: str) -> None:
    fusion = fit(mode, sample(1500, 2), view_dropout=0.5).fusion
    test = sample(600, 12)
    gains = []
    for kept in (0, 2, 4):
        content = test.scores.content.copy()
        content[:, 1 + kept :] = 0
        wild = test.scores.logits.copy()
        wild[:, 1 + kept :] = 1e3
        fused = fusion.fuse(wild, test.scores.features, content, test.scores.boxes)
        gains.append(loss(test.scores.logits[:, 0], test.labels) - loss(fused, test.labels))
    assert min(gains) > -0.05, "fewer views are worse than the single one"
    assert gains[2] > max(gains[:2])


def test_view_dropout_keeps_global_views_and_any_number_of_tiles() -> None:
    views = tensors(sample(4000).scores)
    dropped = drop_views(views, 0.4, torch.Generator().manual_seed(1))
    assert dropped.present[:, 0].all()
    left = dropped.tiles.sum(1)
    changed = left < 4
    # Of 4 tiles, uniformly many are kept: a fifth of the chosen images keep all.
    assert float(changed.float().mean()) == pytest.approx(0.4 * 0.8, abs=0.03)
    counts = torch.bincount(left, minlength=5)[:4].float() / 4000
    torch.testing.assert_close(counts, torch.full((4,), 0.08), atol=0.02, rtol=0)
    none = drop_views(views, 0.0, torch.Generator().manual_seed(1))
    assert none.present.all()


def test_masked_mean_of_nothing_is_zero() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    found = masked_mean(torch.tensor([[3.0, 5.0], [1.0, 2.0]]), mask)
    assert found.tolist() == [3.0, 0.0]


def test_an_mlp_head_can_be_used() -> None:
    head = nn.Sequential(nn.Linear(D, 4), nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 1))
    fitted = fit_fusion("latent", QUICK.model_copy(update={"epochs": 2}), GRID, sample(),
                        sample(200, 1), head, seed=7)  # fmt: skip
    scores = sample(5).scores
    np.testing.assert_array_equal(fitted.fusion.fuse(*scores), fitted.fusion.fuse(*scores))
    assert head.training


def test_what_cannot_be_fitted() -> None:
    one_class = replace(sample(), labels=np.ones(300, np.int64))
    with pytest.raises(UserError, match="fusion part does not have both classes"):
        fit("mlp", one_class)
    with pytest.raises(UserError, match="needs the classifier's head"):
        fit_fusion("latent", QUICK, GRID, sample(), sample(200, 1), None, seed=7)
    broken = sample(200, 1)
    broken.scores.logits[0, 0] = np.nan
    with pytest.raises(UserError, match="diverged in epoch 1"):
        fit_fusion("mlp", QUICK, GRID, sample(), broken, None, seed=7)


# --------------------------------------------------------------------------- choosing


def choose(
    settings: Cvfm, grid: ViewGrid, train: LabelledViews, select: LabelledViews,
    head: nn.Module | None, threshold: float = 0.5,
) -> tuple[Fusion, dict[str, Any]]:  # fmt: skip
    """The choice under one condition."""
    return choose_fusion(settings, grid, train, {"clean": select}, "clean", head, threshold, 7)


def test_auto_takes_the_lowest_log_loss_and_reports_every_mode() -> None:
    settings_ = QUICK.model_copy(update={"epochs": 10})
    fusion, report = choose(settings_, GRID, sample(), sample(200, 1), make_head(), 0.4)
    assert set(report["modes"]) == set(MODES)
    best = min(report["modes"].values(), key=lambda row: row["clean"]["log_loss"])
    assert report["modes"][fusion.config.mode] == best
    assert report["mode"] == fusion.config.mode
    assert report["gain"]["log_loss"] < 0
    assert {row["views"] for name, row in report["modes"].items() if name != "single"} == {5}
    assert report["modes"]["single"]["views"] == 1
    assert report["modes"]["single"]["parameters"] == 0
    # At the phase-2 threshold it is the fused logit itself that is cut.
    select = sample(200, 1)
    fused = fusion.fuse(*select.scores)
    decided = (1 / (1 + np.exp(-fused)) > 0.4).astype(float)
    at_threshold = all_metrics(select.labels, decided)["mcc"]
    assert best["clean"]["mcc_at_phase_2_threshold"] == pytest.approx(at_threshold)


def test_fusion_that_does_not_help_is_not_shipped() -> None:
    rng = np.random.default_rng(3)

    def part(n: int, seed: int) -> LabelledViews:
        """All evidence is in the global view; tiles mislead VAL_SELECT's images."""
        made = sample(n, seed)
        logits = np.stack([4.0 * made.labels - 2, *rng.normal(0, 3, (4, n))], axis=1)
        logits[:, 0] += rng.normal(0, 1.5, n)
        features = rng.normal(size=made.scores.features.shape).astype(np.float16)  # type: ignore[union-attr]
        return LabelledViews(
            made.scores._replace(logits=logits, features=features), made.labels, made.groups
        )

    heavy = QUICK.model_copy(update={"epochs": 5, "weight_decay": 10.0})
    fusion, report = choose(heavy, GRID, part(300, 0), part(300, 1), make_head())
    losses = {mode: row["clean"]["log_loss"] for mode, row in report["modes"].items()}
    assert losses["single"] < min(losses["simple_mean"], losses["content_aware"])
    assert losses[fusion.config.mode] <= losses["single"]


def test_fusion_is_chosen_in_the_condition_that_is_served() -> None:
    """Tiles tell the truth on clean images and nothing on distorted ones."""
    rng = np.random.default_rng(3)

    def part(n: int, seed: int, condition: str) -> LabelledViews:
        made = sample(n, seed)
        truth = 2.0 * made.labels - 1
        tiles = np.stack([2 * truth if condition == "clean" else 0 * truth] * 4, axis=1)
        logits = np.column_stack([2 * truth, tiles]) + rng.normal(0, 2, (n, 5))
        features = rng.normal(size=(n, 5, D)).astype(np.float16)
        scores = made.scores._replace(logits=logits, features=features)
        return LabelledViews(scores, made.labels, made.groups)

    select = {name: part(400, 1, name) for name in ("clean", "served")}
    settings_ = QUICK.model_copy(update={"epochs": 2})
    found = {
        name: choose_fusion(settings_, GRID, part(400, 0, name), select, name, make_head(), 0.5, 7)[
            1
        ]
        for name in select
    }
    for name, report in found.items():
        assert report["fit_on"] == name
        losses = {mode: row[name]["log_loss"] for mode, row in report["modes"].items()}
        assert report["mode"] == min(losses, key=lambda mode: losses[mode])
        for metric, gain in report["gain"].items():
            ours, single = (report["modes"][mode][name] for mode in (report["mode"], "single"))
            assert gain == ours[metric] - single[metric]
    # What gains on clean images loses on distorted ones, and is not shipped for them.
    clean, served = found["clean"], found["served"]
    assert clean["gain"]["mcc"] > 0.1
    rows = clean["modes"]
    assert rows[clean["mode"]]["served"]["mcc"] < rows["single"]["served"]["mcc"] - 0.1
    assert served["gain"]["log_loss"] <= 0
    assert served["mode"] != clean["mode"]


def test_trained_modes_stop_in_the_condition_that_decides() -> None:
    train, clean, other = sample(), sample(200, 1), sample(200, 2)
    plain = choose(QUICK.model_copy(update={"mode": "mlp"}), GRID, train, clean, make_head())
    both = choose_fusion(QUICK.model_copy(update={"mode": "mlp"}), GRID, train,
                         {"clean": clean, "served": other}, "clean", make_head(), 0.5, 7)  # fmt: skip
    for scores in (clean.scores, other.scores):
        np.testing.assert_array_equal(plain[0].fuse(*scores), both[0].fuse(*scores))
    assert plain[1]["gain"] == both[1]["gain"]
    alone = choose(QUICK.model_copy(update={"mode": "mlp"}), GRID, train, other, make_head())[1]
    assert both[1]["modes"]["single"]["served"] == alone["modes"]["single"]["clean"]


@pytest.mark.parametrize("mode", TRAINED)
def test_the_epoch_is_chosen_on_val_select(mode: str) -> None:
    """Against scikit-learn's log loss of the weights that are returned, where TRAIN's is another one."""
    found, select = fit(mode), sample(200, 1)
    [history], [chosen] = found.log_losses, found.epochs
    losses = [
        log_loss(part.labels, sigmoid(found.fusion.fuse(*part.scores)))
        for part in (select, sample())
    ]
    assert history[chosen] == min(history) == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_bias_and_scale_of_a_rule_are_learnt_on_the_fusion_part() -> None:
    train, made = sample(), sample(200, 1)
    scores = made.scores._replace(logits=made.scores.logits / 2 + 1)  # VAL_SELECT's would be others
    select = LabelledViews(scores, made.labels, made.groups)
    _, report = choose(QUICK.model_copy(update={"epochs": 1}), GRID, train, select, make_head())
    for mode in UNTRAINED:
        fuse = rule(mode).fuse
        fitted, own = (
            log_loss(
                made.labels, sigmoid(Platt().fit(fuse(*part.scores), part.labels)(fuse(*scores)))
            )
            for part in (train, select)
        )
        assert report["modes"][mode]["clean"]["log_loss"] == pytest.approx(fitted)
        assert own < fitted - 0.01


def test_rules_are_compared_without_their_bias_and_scale() -> None:
    train, select = sample(), sample(200, 1)

    def shifted(part: LabelledViews) -> LabelledViews:
        scores = part.scores
        return LabelledViews(
            scores._replace(logits=3 * scores.logits + 5), part.labels, part.groups
        )

    plain, moved = (
        choose(QUICK.model_copy(update={"mode": "single", "epochs": 1}), GRID, one(train), one(select),
               make_head())[1]["modes"]["single"]["clean"]
        for one in (lambda p: p, shifted)
    )  # fmt: skip
    assert plain["log_loss"] == pytest.approx(moved["log_loss"], abs=1e-6)
    assert plain["mcc"] == pytest.approx(moved["mcc"])


def test_without_a_fusion_part_only_rules_take_part() -> None:
    scores = ViewScores(*(part[:0] for part in sample().scores))  # type: ignore[index]
    empty = LabelledViews(scores, np.zeros(0, np.int64), np.zeros(0, np.int64))
    _, report = choose(QUICK, GRID, empty, sample(200, 1), make_head())
    assert set(report["modes"]) == set(UNTRAINED)
    with pytest.raises(UserError, match="TRAIN's fusion part"):
        choose(QUICK.model_copy(update={"mode": "mlp"}), GRID, empty, sample(200, 1), make_head())


def test_with_one_view_there_is_nothing_to_choose() -> None:
    grid = ViewGrid()
    fusion, report = choose(QUICK, grid, sample(grid=grid), sample(200, 1, grid), None)
    assert fusion.config.mode == "single"
    assert set(report["modes"]) == {"single"}
    assert report["gain"] == {"mcc": 0.0, "log_loss": 0.0}


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_round_trip(mode: str, fits: int, tmp_path: Path) -> None:
    fusion = fit(mode, epochs=3, fits=fits).fusion if mode in TRAINED else rule(mode)
    for folder in ("one", "another"):
        written = save_fusion(fusion, tmp_path / folder)
    names = sorted(path.name for path in written)
    assert names == ["config.json", WEIGHTS] if mode in TRAINED else ["config.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "another" / name).read_bytes()
    loaded = load_fusion(tmp_path / "one", make_head)
    scores = sample(30, 6).scores
    np.testing.assert_array_equal(loaded.fuse(*scores), fusion.fuse(*scores))
    assert loaded.config == fusion.config
    if mode in TRAINED:
        state = torch.load(tmp_path / "one" / WEIGHTS, weights_only=True)
        assert not [name for name in state if "head" in name.split(".")]


def test_single_and_batched_agree() -> None:
    scores = sample(40, 8).scores
    for mode in TRAINED:
        fusion = fit(mode, epochs=3).fusion
        batched = fusion.fuse(*scores)
        single = [
            fusion.fuse(*(part[row : row + 1] for part in scores if part is not None))[0]
            for row in range(40)
        ]
        np.testing.assert_allclose(single, batched, atol=1e-9, rtol=0)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    save_fusion(fit("latent", epochs=1).fusion, tmp_path)
    state = torch.load(tmp_path / WEIGHTS, weights_only=True)
    config = FusionConfig.of("latent", QUICK, GRID, D).to_dict()
    cases: list[tuple[dict[str, Any], str]] = [
        ({**state, "head.weight": torch.zeros(1, D)}, "would replace the classifier's head"),
        ({k: v for k, v in state.items() if k != "decoders"}, "1 tensors missing"),
        ({**state, "more": torch.zeros(1)}, "1 unexpected"),
    ]
    for content, message in cases:
        torch.save(content, tmp_path / WEIGHTS)
        with pytest.raises(UserError, match=message):
            load_fusion(tmp_path, make_head)
    for change in ({"mode": "best"}, {"options": {}}, {"grid": {"grid": 99}}, {"features": None}):
        with pytest.raises(UserError, match="fusion config"):
            FusionConfig.from_dict(config | change)
    assert freeze_head(None) is None
