"""Backbones by name, at any input size, with weights that fit or one clear refusal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from streetvision.errors import UserError
from streetvision.models.backbone import (
    ARCHITECTURES,
    build_backbone,
    freeze_norm_statistics,
    load_weights,
    resolve,
)

TINY = ARCHITECTURES["street_resnet_tiny"]


def tiny(**changes: Any) -> nn.Module:
    return build_backbone(TINY.timm_name, {**TINY.arguments, **changes})


def test_the_names_of_bundles_are_timms() -> None:
    for architecture in ARCHITECTURES.values():
        assert timm.is_model(architecture.timm_name)


# The last four keep a hidden layer of their head, which widens what comes out.
@pytest.mark.parametrize(
    "name",
    [
        *ARCHITECTURES, "efficientnet_b0", "vit_tiny_patch16_224",
        "mobilenetv4_conv_small_035", "mobilenetv3_small_050", "ghostnet_050", "lcnet_035",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("height", "width"), [(64, 96), (48, 48)])
def test_a_backbone_gives_one_feature_vector_an_image(name: str, height: int, width: int) -> None:
    timm_name, arguments, mean, std = resolve(name, height, width)
    model = build_backbone(timm_name, arguments).eval()
    with torch.no_grad():
        features = model(torch.zeros(2, 3, height, width))
    assert features.shape == (2, model.num_features)
    assert len(mean) == len(std) == 3
    assert ("img_size" in arguments) == ("vit" in name or "xcit" in name)


def test_the_arguments_survive_json() -> None:
    import json

    for name in ARCHITECTURES:
        timm_name, arguments, _, _ = resolve(name, 32, 48)
        again = json.loads(json.dumps(arguments))
        shapes = {k: v.shape for k, v in build_backbone(timm_name, again).state_dict().items()}
        built = build_backbone(timm_name, arguments).state_dict()
        assert shapes == {k: v.shape for k, v in built.items()}


def test_mean_and_std_are_timms_or_ours() -> None:
    config = timm.get_pretrained_cfg("efficientnet_b0")
    assert resolve("efficientnet_b0", 32, 32)[2:] == (config.mean, config.std)
    assert resolve("mobilenetv2_100_same", 32, 32)[2:] == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet81", "resnet18"),
        ("street_resnt", "street_resnet"),
        ("qqqqqqqqq", "street_vit"),
        ("resnet18.nosuch", "resnet18.a1_in1k"),
    ],
)
def test_an_unknown_name_lists_close_ones(name: str, close: str) -> None:
    with pytest.raises(UserError, match=rf'"{name}" is unknown; near it: .*{close}'):
        resolve(name, 32, 32)


def test_arguments_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(UserError, match="backbone resnet18 cannot be built"):
        build_backbone("resnet18", {"wings": 2})


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(UserError, match=r"could not be fetched from the hub .*no route to host"):
        build_backbone("resnet18", {}, pretrained=True)


# --------------------------------------------------------------------------- weights


def with_head() -> dict[str, torch.Tensor]:
    """The state of a tiny network with a head of five classes."""
    torch.manual_seed(1)
    model = timm.create_model(TINY.timm_name, num_classes=5, **TINY.arguments)
    return dict(model.state_dict())


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "key"),
    [("w.safetensors", None), ("w.pth", None), ("w.pt", None), ("w.pth", "state_dict"), ("w.pth", "model")],
)  # fmt: skip
def test_weights_are_loaded_without_their_head(name: str, key: str | None, tmp_path: Path) -> None:
    state = with_head()
    path = write(tmp_path / name, state if key is None else {key: state, "epoch": 3})
    torch.manual_seed(2)
    model = tiny()
    load_weights(model, path)
    loaded = model.state_dict()
    assert set(state) - set(loaded) == {"fc.weight", "fc.bias"}
    for name_, tensor in loaded.items():
        assert torch.equal(tensor, state[name_])


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", with_head())
    refusal = r"another architecture: 0 tensors missing, 0 unexpected, [1-9]\d* of another shape"
    with pytest.raises(UserError, match=refusal) as caught:
        load_weights(tiny(channels=[8, 16, 32, 128]), path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"[1-9]\d* tensors missing, [1-9]\d* unexpected"):
        load_weights(build_backbone(*resolve("street_vit", 32, 32)[:2]), path)
    path = write(tmp_path / "empty.pth", {})
    with pytest.raises(UserError, match=r"[1-9]\d* tensors missing, 0 unexpected"):
        load_weights(tiny(), path)


def test_a_refusal_changes_no_weight(tmp_path: Path) -> None:
    state = with_head()
    del state["bn1.weight"]
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="1 tensors missing"):
        load_weights(model, write(tmp_path / "w.pth", state))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights file .*w.pth does not exist"):
        load_weights(tiny(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not exist"):
        load_weights(tiny(), tmp_path)
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(UserError, match=rf"weights file .*{name} cannot be read"):
            load_weights(tiny(), tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(tiny(), write(tmp_path / "list.pth", [1, 2]))
    (tmp_path / "w.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"must end in .safetensors, .pth or .pt"):
        load_weights(tiny(), tmp_path / "w.onnx")


class Malicious:
    """Runs a command when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", {"bn1.weight": Malicious(tmp_path / "hacked")})
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(tiny(), path)
    assert not (tmp_path / "hacked").exists()


def test_real_weights_give_timms_own_features(repository: Path) -> None:
    path = repository / "../shared/weights/mobilenetv2_100.safetensors"
    if not path.is_file():
        pytest.skip("../shared/weights/mobilenetv2_100.safetensors is not on this machine")
    timm_name, arguments, _, _ = resolve("mobilenetv2_100_same", 96, 128)
    model = build_backbone(timm_name, arguments).eval()
    load_weights(model, path)
    reference = timm.create_model(
        "mobilenetv2_100", pad_type="same", checkpoint_path=str(path)
    ).eval()
    torch.manual_seed(0)
    images = torch.rand(2, 3, 96, 128) * 2 - 1
    with torch.no_grad():
        wanted = reference.forward_head(reference.forward_features(images), pre_logits=True)
        assert torch.equal(model(images), wanted)
    assert wanted.std() > 0.01


def test_norm_statistics_freeze() -> None:
    model = tiny().train()
    freeze_norm_statistics(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3, 32, 48))
    assert len(before) > 10
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert model.training
