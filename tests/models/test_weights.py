"""Weights files as people have them: taken whole, from whatever wraps them, or refused in one line."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import logging
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from streetvision.core.errors import UserError
from streetvision.models.backbone import ARCHITECTURES, build_backbone, resolve
from streetvision.models.weights import fill, load_weights, read_state_dict

State = dict[str, torch.Tensor]
TINY = ARCHITECTURES["street_resnet_tiny"]


def tiny(**changes: Any) -> nn.Module:
    torch.manual_seed(2)
    return build_backbone(TINY.timm_name, {**TINY.arguments, **changes})


def with_head(seed: int = 1) -> State:
    """The state of a tiny network with a head of five classes."""
    torch.manual_seed(seed)
    model = timm.create_model(TINY.timm_name, num_classes=5, **TINY.arguments)
    return dict(model.state_dict())


def prefixed(prefix: str, state: State | None = None) -> State:
    return {prefix + name: value for name, value in (state or with_head()).items()}


def write(path: Path, content: Any, **options: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, **options)
    return path


def refusal(path: Path, model: nn.Module | None = None) -> str:
    """What is said of a file, which must leave the model as it was."""
    model = model or tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    assert len(text) < 600
    return text


def assert_loaded(path: Path, state: State | None = None) -> None:
    state = state or with_head()
    model = tiny()
    load_weights(model, path)
    loaded = model.state_dict()
    assert state.keys() - loaded.keys() == {"fc.weight", "fc.bias"}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name]), name


# --------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    "name",
    [
        "w.safetensors",
        "w.pth",
        "w.pt",
        "pytorch_model.bin",
        "w.ckpt",
        "w.pth.tar",
        "w.th",
        "weights",
    ],
)
def test_weights_are_loaded_without_their_head_whatever_the_suffix(
    name: str, tmp_path: Path
) -> None:
    assert_loaded(write(tmp_path / name, with_head()))


def test_files_are_told_apart_by_content(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", with_head())
    assert_loaded(path.rename(tmp_path / "safetensors.pth"))
    path = write(tmp_path / "w.pth", with_head())
    assert_loaded(path.rename(tmp_path / "pickled.safetensors"))
    # As torch wrote before 1.6.
    assert_loaded(write(tmp_path / "old.pth", with_head(), _use_new_zipfile_serialization=False))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda s: prefixed("module.", s),
        lambda s: prefixed("_orig_mod.", s),
        lambda s: prefixed("module._orig_mod.", s),
        lambda s: prefixed("_orig_mod.module.", s),
        lambda s: prefixed("backbone.", s),
        lambda s: prefixed("encoder.", s) | {"projection.0.weight": torch.ones(3)},
        lambda s: {"state_dict": prefixed("model.", s), "hyper_parameters": {"lr": 0.1}},
        lambda s: {"state_dict": prefixed("model.backbone._orig_mod.", s)},
        lambda s: {"model": {"module": prefixed("net.0.", s)}},
        lambda s: {name.replace("layer1.", "layer1._orig_mod."): v for name, v in s.items()},
        lambda s: {"teacher": prefixed("module.backbone.", s)},
        # A moving average is taken before what it averages, as timm does.
        lambda s: {"state_dict": with_head(3), "state_dict_ema": s},
        lambda s: {"model": with_head(3), "model_ema": prefixed("module.", s)},
        lambda s: prefixed("model.", with_head(3)) | prefixed("ema_model.", s),
        # The network itself before what a callback keeps; twice the same is no question.
        lambda s: {"callbacks": {"best": with_head(3)}, "state_dict": s},
        lambda s: prefixed("encoder_q.", s) | prefixed("encoder_k.", s),
    ],
)  # fmt: skip
def test_weights_are_found_in_their_wrapping(
    wrapped: Callable[[State], Any], tmp_path: Path
) -> None:
    assert_loaded(write(tmp_path / "w.pth", wrapped(with_head())))


def test_batch_norm_without_its_counter(tmp_path: Path) -> None:
    state = {n: t for n, t in with_head().items() if not n.endswith("num_batches_tracked")}
    model = tiny()
    load_weights(model, write(tmp_path / "w.pth", state))
    for name, tensor in model.state_dict().items():
        wanted = state[name] if name in state else torch.tensor(0)
        assert torch.equal(tensor, wanted), name


class Settings:
    """A class of the user's, which is not imported to read the weights."""


@pytest.mark.parametrize("new", [True, False])
def test_settings_beside_the_weights_do_no_harm(new: bool, tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    content = {
        "state_dict": with_head(),
        "args": argparse.Namespace(lr=0.1, output=Path("runs"), root=PureWindowsPath("C:/data")),
        "best": np.float64(0.5),
        "generator": np.random.default_rng(0).integers(0, 9, 5),
        "when": dt.datetime(2024, 5, 1, tzinfo=dt.UTC),
        "version": torch.__version__,
        "counts": collections.defaultdict(list, {"a": [1]}),
    }
    assert_loaded(write(tmp_path / "w.pth", content, _use_new_zipfile_serialization=new))
    # torch tells the classes of its newer files in advance.
    path = write(
        tmp_path / "own.pth", content | {"config": Settings()}, _use_new_zipfile_serialization=new
    )
    if new:
        assert_loaded(path)
    else:
        assert "holds tests.models.test_weights.Settings beside weights" in refusal(path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    state = {n: t.half() if t.is_floating_point() else t for n, t in with_head().items()}
    model = tiny()
    load_weights(model, write(tmp_path / "w.pth", state))
    assert model.state_dict()["bn1.weight"].dtype == torch.float32
    assert torch.equal(
        model.state_dict()["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"].float()
    )


# A ViT, one with two tokens in front, and one that resizes tables of relative positions.
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"],
)
def test_positions_of_another_size_are_those_that_timm_makes(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    options = {"depth": 2} if "swin" not in name else {"depths": (1, 1, 1, 1), "embed_dim": 24}
    state = timm.create_model(name, **options).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_()
    path = write(tmp_path / "w.pth", {"state_dict": prefixed("module.", state)})
    timm_name, arguments, _, _ = resolve(name, 64, 96)
    model = build_backbone(timm_name, {**arguments, **options}).eval()
    with caplog.at_level(logging.INFO):
        load_weights(model, path)
    assert "as timm does it" in caplog.text
    # timm's own way from a file to a model.
    wanted = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)}, num_classes=0,
        img_size=(64, 96), **options,
    ).eval()  # fmt: skip
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(images), wanted(images))


def test_positions_of_a_grid_that_is_no_square(tmp_path: Path) -> None:
    """What this project saved at a grid that is no square comes back as it was."""
    timm_name, arguments, _, _ = resolve("street_vit", 32, 64)
    torch.manual_seed(0)
    state = build_backbone(timm_name, arguments).state_dict()
    model = build_backbone(timm_name, arguments)
    load_weights(model, write(tmp_path / "w.safetensors", dict(state)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    other = build_backbone(*resolve("street_vit", 64, 96)[:2])
    assert "pos_embed: 1 × 8 × 64 for 1 × 24 × 64" in refusal(tmp_path / "w.safetensors", other)


# --------------------------------------------------------------------------- what is refused


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", with_head())
    text = refusal(path, tiny(channels=[8, 16, 32, 128]))
    assert re.search(
        r"architecture: 0 tensors missing, 0 unexpected, [1-9]\d* of another shape", text
    )
    assert "layer4.0.bn1.bias: 64 for 128" in text or "64 × 32 × 3 × 3 for 128 × 32 × 3 × 3" in text
    text = refusal(path, build_backbone(*resolve("street_vit", 32, 32)[:2]))
    assert re.search(r"[1-9]\d* tensors missing \(\S+, \S+, …\), 0 unexpected", text)
    assert "its names are such as bn1.bias" in text


@pytest.mark.parametrize("missing", ["bn1.weight", "layer4.0.conv2.weight", "bn1.running_var"])
def test_half_a_backbone_is_refused(missing: str, tmp_path: Path) -> None:
    state = with_head()
    del state[missing]
    for number, content in enumerate((state, prefixed("module.", state), {"model": state})):
        assert f"1 tensors missing ({missing})" in refusal(
            write(tmp_path / f"{number}.pth", content)
        )


def test_more_than_a_backbone_is_refused_where_it_is_part_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deeper = with_head() | {"layer3.1.conv1.weight": torch.ones(2)}
    text = refusal(write(tmp_path / "deeper.pth", deeper))
    assert "0 tensors missing, 1 unexpected (layer3.1.conv1.weight)" in text
    # Other networks beside it are none of its parts.
    beside = with_head() | {"decoder.0.weight": torch.ones(2), "mask_token": torch.ones(1)}
    assert_loaded(write(tmp_path / "beside.pth", beside))
    assert "left out, for this backbone has no such parts: decoder, mask_token" in caplog.text


def test_two_networks_are_a_question(tmp_path: Path) -> None:
    both = {"student": prefixed("backbone.", with_head(3)), "teacher": prefixed("backbone.")}
    text = refusal(write(tmp_path / "w.pth", both))
    assert "several networks, at student.backbone and teacher.backbone" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_told_at_loading(value: float, tmp_path: Path) -> None:
    state = with_head()
    state["layer2.0.conv1.weight"][0, 0, 1, 1] = value
    for number, content in enumerate((state, {"state_dict": prefixed("module.", state)})):
        text = refusal(write(tmp_path / f"{number}.pth", content))
        assert "holds numbers that are not finite, in layer2.0.conv1.weight" in text
    with pytest.raises(UserError, match=r"not finite, in layer2\.0\.conv1\.weight"):
        fill(timm.create_model(TINY.timm_name, num_classes=5, **TINY.arguments), state, tmp_path)
    # A head that is left out may hold what it likes.
    state = with_head()
    state["fc.bias"][0] = value
    load_weights(tiny(), write(tmp_path / "head.pth", state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: (t * 9).to(torch.int8) if t.ndim == 4 else t for n, t in s.items()},
         "8 × 3 × 3 × 3 int8|× 3 × 3 int8 for"),
        (lambda s: s | {"bn1.weight": s["bn1.weight"].to_sparse()}, "bn1.weight: 8 sparse for 8"),
        (lambda s: s | {"bn1.weight": s["bn1.weight"] + 1j}, "bn1.weight: 8 complex64 for 8"),
        (lambda s: {"base_model.model.layer1.0.conv1.lora_A.weight": torch.ones(2)}, "holds adapters"),
        (lambda s: {"vit.embeddings.patch_embeddings.projection.bias": torch.ones(2)},
         "transformers' names; take timm's"),
        (lambda s: {}, "holds no tensors by name"),
        (lambda s: [1, 2], "holds no tensors by name"),
        (lambda s: tiny(), r"whole pickled network \(torch.nn.*save its state_dict"),
    ],
)  # fmt: skip
def test_what_is_no_backbone_for_training(change: Any, message: str, tmp_path: Path) -> None:
    assert re.search(message, refusal(write(tmp_path / "w.pth", change(with_head()))))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "w.pth")
    assert "is a folder; name the file in it" in refusal(tmp_path)
    whole = write(tmp_path / "whole.pth", with_head()).read_bytes()
    old = write(
        tmp_path / "old.pth", with_head(), _use_new_zipfile_serialization=False
    ).read_bytes()
    safe = write(tmp_path / "whole.safetensors", with_head()).read_bytes()
    for number, (content, message) in enumerate([
        (b"", "is empty"),
        (b"no weights at all", "neither safetensors nor written by torch.save"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\n  <html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9", "pointer of Git LFS"),
        (b'{"metadata": {}, "weight_map": {}}', "index of weights in several files"),
        (b"\x1f\x8b\x08\x00", "is compressed"),
        (b"\x89HDF\r\n", "Keras"),
        (whole[: len(whole) // 2], "is not whole"),
        (old[: len(old) // 2], "is not whole"),
        (safe[: len(safe) // 2], "is not whole"),
        (safe[:40], "is not whole"),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.pth"
        path.write_bytes(content)
        assert message in refusal(path)
    np.savez(tmp_path / "w.npz", weight=np.ones(2))
    assert "an archive of something else" in refusal(tmp_path / "w.npz")
    part = write(tmp_path / "model-00001-of-00002.safetensors", {"bn1.weight": torch.ones(8)})
    assert "one of several files" in refusal(part)
    newer = write(tmp_path / "newer.pth", with_head(), pickle_protocol=4)
    assert "save it with that" in refusal(newer)


class Malicious:
    """Runs a command when it is unpickled without care."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("function", "told"),
    [(os.mkdir, "posix.mkdir"), (subprocess.check_call, "check_call"), (eval, "eval"),
     (torch.hub.load, "torch.hub.load"), (np.load, "numpy.*load")],
)  # fmt: skip
def test_code_in_a_file_is_not_run(
    function: Callable[..., Any], told: str, new: bool, tmp_path: Path
) -> None:
    target = tmp_path / "hacked"
    argument = {
        os.mkdir: str(target), subprocess.check_call: ["touch", str(target)],
        eval: f"open({str(target)!r}, 'w')",
    }.get(function, str(target))  # fmt: skip
    content = {"state_dict": with_head(), "args": Malicious(function, argument)}
    path = write(tmp_path / "w.pth", content, _use_new_zipfile_serialization=new)
    assert re.search(told, refusal(path))
    assert not target.exists()


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


def test_names_of_dictionaries_in_dictionaries_are_joined(tmp_path: Path) -> None:
    content = {"a": {"b.c": torch.ones(1), 3: torch.ones(1)}, "d": nn.Parameter(torch.ones(2))}
    found = read_state_dict(write(tmp_path / "w.pth", content))
    assert {name: tuple(value.shape) for name, value in found.items()} == {"a.b.c": (1,), "d": (2,)}
    assert not found["d"].requires_grad
