"""A bundle that fuses views gives the logits that its policy was fitted on, for one image or many."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from safetensors.torch import load_file, save_file

from streetvision.bundle.export import FUSION_WEIGHTS, export_bundle
from streetvision.bundle.predictor import Predictor
from streetvision.bundle.validate import BUNDLE_JSON, sealed
from streetvision.core.artifacts import json_text, sha256_file
from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, ViewGrid
from streetvision.data.store import open_split
from streetvision.data.views import ViewScores
from streetvision.decision.hard_images import HardImages
from streetvision.fusion.fitting import LabelledViews, fit_fusion
from streetvision.fusion.fusion import (
    TRAINED,
    WEIGHTS,
    Fusion,
    FusionConfig,
    load_fusion,
    save_fusion,
)
from streetvision.models.classifier import load_classifier
from streetvision.models.multiview import score_split_views

if TYPE_CHECKING:
    from tests.conftest import Trained

GRID = ViewGrid(grid=2)
SETTINGS = Cvfm(fits=2, epochs=3, latent_dim=8, attention_dim=8, attention_heads=2)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scored:
    """VAL_TEST's images, and the scores of theirs and of VAL_SELECT's views."""

    images: list[Image]
    test: ViewScores
    select: LabelledViews


@pytest.fixture(scope="module")
def scored(trained: Trained, tiny_splits: dict[str, Path]) -> Scored:
    model, config = load_classifier(trained.classifier)
    test = open_split("evaluate", "val_test", tiny_splits["val_test"])
    select = open_split("embed", "val_select", tiny_splits["val_select"])
    scores = [
        score_split_views(model, config.preprocessing, split, GRID, 16, CPU)
        for split in (test, select)
    ]
    images = [test.image(row) for row in range(len(test))]
    return Scored(images, scores[0], LabelledViews(scores[1], select.labels, select.groups))


def make(mode: str, trained: Trained, scored: Scored) -> Fusion:
    if mode not in TRAINED:
        return Fusion(FusionConfig.of(mode, SETTINGS, GRID, 0))
    head = load_classifier(trained.classifier)[0].head
    return fit_fusion(mode, SETTINGS, GRID, scored.select, scored.select, head, seed=7).fusion


def export(fusion: Fusion, trained: Trained, folder: Path) -> Path:
    save_fusion(fusion, folder / "cvfm")
    export_bundle(
        trained.classifier, trained.scrc_params, trained.scrc_pickle, folder / "bundle",
        cvfm=folder / "cvfm", batch_size=16, make_tar=True,
    )  # fmt: skip
    return folder / "bundle"


@pytest.mark.parametrize("mode", ["single", "topk_mean", "content_aware", *TRAINED])
def test_the_bundle_fuses_as_the_policy_was_fitted(
    mode: str, trained: Trained, scored: Scored, tmp_path: Path
) -> None:
    fusion = make(mode, trained, scored)
    bundle = export(fusion, trained, tmp_path)
    document = json.loads((bundle / BUNDLE_JSON).read_text())
    assert document["views"]["mode"] == mode
    assert (document["cvfm_weights"] is not None) == (mode in TRAINED)
    for name in (WEIGHTS, FUSION_WEIGHTS):
        assert (name in document["files"]) == (mode in TRAINED) == (bundle / name).is_file()
    predictor = Predictor.load(bundle, "cpu")
    expected = fusion.fuse(*scored.test)
    found = predictor.logits(scored.images)
    assert expected.std() > 1e-3
    if mode == "single":  # it computes the global view alone, in other batches
        np.testing.assert_allclose(found, expected, atol=1e-5)
        return
    np.testing.assert_allclose(found, expected, atol=1e-12)
    single = [predictor.logits([image])[0] for image in scored.images[:6]]
    np.testing.assert_allclose(single, expected[:6], atol=1e-9)
    probabilities = predictor.probabilities(scored.images)
    deployed = predictor.policy.deployed_probability(expected)
    np.testing.assert_allclose(probabilities, deployed, atol=1e-12)


@pytest.mark.parametrize("mode", ["content_aware", "mlp", "single"])
def test_a_second_pass_is_composed_as_the_policy_was_fitted(
    mode: str, trained: Trained, scored: Scored, tmp_path: Path
) -> None:
    fusion = make(mode, trained, scored)
    predictor = Predictor.load(export(fusion, trained, tmp_path), "cpu")
    single, fused = scored.test.logits[:, 0], fusion.fuse(*scored.test)
    hard = HardImages(*np.quantile(single, [0.3, 0.7]))
    chosen = hard.chosen(single)
    assert 0 < chosen.sum() < len(single) / 2
    predictor.policy = replace(predictor.policy, hard_images=hard)
    by_hand = np.where(chosen, fused, single)
    found = predictor.logits(iter(scored.images))
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    one_by_one = [predictor.logits([image])[0] for image in scored.images]
    np.testing.assert_allclose(one_by_one, by_hand, atol=1e-6)
    deployed = predictor.policy.deployed_probability(by_hand)
    np.testing.assert_array_equal(predictor.probabilities(scored.images) > 0.5, deployed > 0.5)
    if mode == "single":
        np.testing.assert_array_equal(by_hand, single)
        return
    assert np.abs(by_hand - single)[chosen].min() > 1e-6
    # Easy images cost one view each.
    passes: list[int] = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    predictor.logits(scored.images)
    assert sum(passes) == len(single) + chosen.sum() * fusion.n_views


@pytest.mark.parametrize("name", [WEIGHTS, FUSION_WEIGHTS])
def test_changed_fusion_weights_are_refused(
    name: str, trained: Trained, scored: Scored, tmp_path: Path
) -> None:
    bundle = export(make("mlp", trained, scored), trained, tmp_path)
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} was changed after export"):
        Predictor.load(bundle, "cpu")
    (bundle / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Predictor.load(bundle, "cpu")


def forge(bundle: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """The refusal of a bundle that is changed by somebody who knows how it is sealed."""
    document = json.loads((bundle / BUNDLE_JSON).read_text())
    change(document)
    for name in document["files"]:
        document["files"][name] = sha256_file(bundle / name)
    (bundle / BUNDLE_JSON).write_text(json_text(sealed(document)))
    with pytest.raises(UserError) as caught:
        Predictor.load(bundle, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fusion_that_does_not_fit_is_refused(
    trained: Trained, scored: Scored, tmp_path: Path
) -> None:
    bundle = export(make("mlp", trained, scored), trained, tmp_path)
    shutil.copytree(bundle, tmp_path / "one")
    refused = forge(tmp_path / "one", lambda d: d.update(cvfm_weights=WEIGHTS))
    assert "cvfm_weights is 'cvfm_weights.pth'; it must match" in refused
    shutil.copytree(bundle, tmp_path / "two")
    refused = forge(tmp_path / "two", lambda d: d.update(cvfm_weights=None))
    assert "views.mode mlp needs cvfm_weights" in refused
    shutil.copytree(bundle, tmp_path / "three")
    refused = forge(tmp_path / "three", lambda d: d["views"].update(features=63))
    assert "views.features is 63; the backbone has 64" in refused
    shutil.copytree(bundle, tmp_path / "four")
    refused = forge(
        tmp_path / "four",
        lambda d: d["views"]["options"].update(hidden_dim=10**12, hidden_layers=4),
    )
    assert "views cannot be built" in refused or "far larger than its weights" in refused
    state = load_file(bundle / FUSION_WEIGHTS)
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, bundle / FUSION_WEIGHTS)
    assert "not finite" in forge(bundle, lambda _: None)


def test_loading_runs_no_pickle(
    trained: Trained, scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export(make("latent", trained, scored), trained, tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for path in (bundle, bundle / "bundle.tar.gz"):
        assert Predictor.load(path, "cpu").probabilities([]).shape == (0,)


def test_an_old_fusion_leaves_nothing_behind(
    trained: Trained, scored: Scored, tmp_path: Path
) -> None:
    export(make("mlp", trained, scored), trained, tmp_path)
    bundle = export(make("single", trained, scored), trained, tmp_path)
    assert not (bundle / WEIGHTS).exists()
    assert not (bundle / FUSION_WEIGHTS).exists()
    assert not (tmp_path / "cvfm" / WEIGHTS).exists()
    assert load_fusion(tmp_path / "cvfm", torch.nn.Identity).config.mode == "single"


def test_an_export_without_the_fusion_weights(
    trained: Trained, scored: Scored, tmp_path: Path
) -> None:
    save_fusion(make("mlp", trained, scored), tmp_path / "cvfm")
    (tmp_path / "cvfm" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS} does not exist"):
        export_bundle(
            trained.classifier, trained.scrc_params, trained.scrc_pickle, tmp_path / "bundle",
            cvfm=tmp_path / "cvfm", batch_size=16, make_tar=False,
        )  # fmt: skip
    assert not (tmp_path / "bundle").exists()
