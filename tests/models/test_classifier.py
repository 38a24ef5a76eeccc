"""The classifier, its files, and scores that do not depend on the batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streetvision.core.errors import UserError
from streetvision.data.store import open_split
from streetvision.data.transforms import Preprocessing
from streetvision.models.backbone import resolve
from streetvision.models.classifier import (
    CONFIG,
    WEIGHTS,
    ClassifierConfig,
    RoadworkClassifier,
    load_classifier,
    load_head,
    pick_device,
    save_classifier,
    score,
)

if TYPE_CHECKING:
    from tests.conftest import Trained

CPU = torch.device("cpu")


def config() -> ClassifierConfig:
    name, arguments, mean, std = resolve("street_resnet_tiny", 32, 48)
    return ClassifierConfig(name, arguments, Preprocessing(32, 48, "letterbox", mean=mean, std=std))


def test_logits_and_features() -> None:
    torch.manual_seed(0)
    model = config().build().eval()
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        logits, features = model(images)
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    assert features.shape == (3, 64)
    # A fresh head is near 0: the first loss is that of a coin.
    assert logits.abs().max() < 1


def test_dropout_works_in_training_alone() -> None:
    torch.manual_seed(0)
    model = RoadworkClassifier(config().build().backbone, dropout=0.5)
    model.backbone.eval()
    images = torch.randn(8, 3, 32, 48)
    with torch.no_grad():
        assert not torch.equal(model(images)[0], model(images)[0])
        model.eval()
        assert torch.equal(model(images)[0], model(images)[0])


def test_a_saved_classifier_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = config().build().eval()
    save_classifier(model, config(), tmp_path)
    torch.manual_seed(1)
    again, found = load_classifier(tmp_path)
    assert found == config()
    assert not again.training
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(again(images)[0], model(images)[0], rtol=1e-6, atol=1e-6)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_equal_weights_give_equal_files(tmp_path: Path, trained: Trained) -> None:
    model, found = load_classifier(trained.classifier)
    save_classifier(model, found, tmp_path)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (trained.classifier / name).read_bytes()


def test_a_head_with_a_hidden_layer(tmp_path: Path) -> None:
    wide = replace(config(), head_hidden=5)
    torch.manual_seed(0)
    model = wide.build().eval()
    assert model.head.in_features == 5
    save_classifier(model, wide, tmp_path)
    again, found = load_classifier(tmp_path)
    assert found == wide
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        logits, features = again(images)
        hidden = torch.nn.functional.gelu(
            features @ model.hidden[0].weight.T + model.hidden[0].bias
        )
        torch.testing.assert_close(logits, hidden @ model.head.weight[0] + model.head.bias)
        alone = load_head(tmp_path)
        torch.testing.assert_close(alone(hidden).squeeze(1), logits)
    assert not alone.training
    assert features.shape == (2, 64)
    assert score(again, found.preprocessing, [], 4, CPU)[1].shape == (0, 64)


def test_a_configuration_without_the_head_has_a_linear_one(saved: Path) -> None:
    document = json.loads((saved / CONFIG).read_text())
    assert document.pop("head_hidden") is None
    (saved / CONFIG).write_text(json.dumps(document))
    assert load_classifier(saved)[1].head_hidden is None


@pytest.fixture
def saved(tmp_path: Path, trained: Trained) -> Path:
    shutil.copytree(trained.classifier, tmp_path / "classifier")
    return tmp_path / "classifier"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_one_line(saved: Path) -> None:
    (saved / CONFIG).rename(saved / "x")
    assert "config.json is missing; the stage `train` makes it" in refusal(saved)
    (saved / "x").rename(saved / CONFIG)
    (saved / WEIGHTS).unlink()
    assert "model.safetensors does not exist" in refusal(saved)


def test_a_head_that_is_not_there_is_one_line(saved: Path) -> None:
    state = load_file(saved / WEIGHTS)
    del state["head.bias"]
    save_file(state, saved / WEIGHTS)
    with pytest.raises(UserError, match=r"model\.safetensors holds no classifier's head"):
        load_head(saved)
    (saved / WEIGHTS).write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"holds no classifier's head.*rerun `train`"):
        load_head(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing; the stage `train`"):
        load_head(saved)


@pytest.mark.parametrize("key", ["backbone", "arguments", "preprocessing"])
def test_an_incomplete_config_is_one_line(saved: Path, key: str) -> None:
    document = json.loads((saved / CONFIG).read_text())
    del document[key]
    (saved / CONFIG).write_text(json.dumps(document))
    assert f"'{key}' is missing" in refusal(saved)


def test_weights_of_another_model_are_one_line(saved: Path) -> None:
    document = json.loads((saved / CONFIG).read_text())
    document["arguments"]["channels"] = [8, 16, 32, 128]
    (saved / CONFIG).write_text(json.dumps(document))
    assert "weights of another architecture: 0 tensors missing" in refusal(saved)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(saved: Path, number: float) -> None:
    state = load_file(saved / WEIGHTS)
    state["head.weight"][0, 3] = number
    save_file(state, saved / WEIGHTS)
    assert "not finite, in head.weight" in refusal(saved)


def test_scores_do_not_depend_on_the_batch(trained: Trained, tiny_splits: dict[str, Path]) -> None:
    model, found = load_classifier(trained.classifier)
    split = open_split("evaluate", "val_test", tiny_splits["val_test"])
    inputs = [found.preprocessing.apply(split.image(row)) for row in range(len(split))]

    def scores(size: int) -> Any:
        return score(model, found.preprocessing, iter(inputs), size, CPU)

    logits, features = scores(16)
    assert logits.shape == (40,)
    assert features.shape == (40, 64)
    assert (logits.dtype, features.dtype) == (np.float32, np.float16)
    for size in (1, 7, 40, 64):
        other, _ = scores(size)
        np.testing.assert_allclose(other, logits, atol=1e-5)
    np.testing.assert_array_equal(scores(16)[0], logits)
    empty, none = score(model, found.preprocessing, [], 4, CPU)
    assert (empty.shape, none.shape) == ((0,), (0, 64))


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(UserError, match=r"hardware.device is cuda, but torch finds no GPU"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == pick_device("cuda").type == "cuda"
