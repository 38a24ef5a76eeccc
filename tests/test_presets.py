"""Presets are valid, and `dvc exp run` with their overrides gets exactly their values."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dvc.utils.hydra import apply_overrides
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streetvision.core.errors import UserError
from streetvision.core.params import Params, check_params
from streetvision.models.backbone import build_backbone, resolve
from streetvision.presets import FOLDER, load_preset, merge, overrides, preset_names, value

DEFAULTS = Params().model_dump(mode="json")


def applied(file: Path, params: Params, current: dict[str, Any]) -> dict[str, Any]:
    """What DVC makes of `current` with the overrides as a shell hands them over."""
    file.write_text(yaml.safe_dump(current, allow_unicode=True))
    arguments = shlex.split(" ".join(overrides(params, current)))
    assert arguments[::2] == ["-S"] * (len(arguments) // 2)
    apply_overrides(file, arguments[1::2])
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    return document


def test_the_presets_of_the_readme_exist() -> None:
    assert preset_names() == ["cpu-demo", "natix-gpu", "photos", "smoke"]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_changes_exactly_what_its_file_says(name: str, tmp_path: Path) -> None:
    params = load_preset(name, tmp_path / "project")
    changes = yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) or {}
    document = merge(DEFAULTS, changes)
    found = params.model_dump(mode="json")
    for section, key in (("data", "local_root"), ("train", "weights")):
        wanted = document[section][key]
        if wanted.startswith("../"):
            document[section][key] = str(tmp_path / wanted.removeprefix("../"))
    assert found == check_params(document, name).model_dump(mode="json")


@pytest.mark.parametrize("name", preset_names())
def test_the_backbone_takes_the_input_of_its_preset(name: str, tmp_path: Path) -> None:
    """A ViT takes whole patches only; without memory for its weights."""
    train = load_preset(name, tmp_path).train
    timm_name, arguments, *_ = resolve(train.backbone, train.height_px, train.width_px)
    with torch.device("meta"):
        backbone = build_backbone(timm_name, arguments)
        features = backbone(torch.zeros(1, 3, train.height_px, train.width_px))
    assert features.shape == (1, backbone.num_features)


def test_cpu_demo_is_the_defaults(tmp_path: Path) -> None:
    assert load_preset("cpu-demo", tmp_path) == Params()
    assert overrides(load_preset("cpu-demo", tmp_path), DEFAULTS) == []


def test_an_unknown_preset_lists_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"cpu" is not one of cpu-demo, natix-gpu, photos, smoke'):
        load_preset("cpu", tmp_path)


def test_relative_paths_outside_the_project_become_absolute(tmp_path: Path) -> None:
    params = load_preset("photos", tmp_path / "a/project")
    assert params.data.local_root == str(tmp_path / "a/shared/photos")
    assert params.train.weights == str(tmp_path / "a/shared/weights/mobilenetv2_100.safetensors")
    assert Params().data.local_root == load_preset("smoke", tmp_path).data.local_root


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("start", preset_names())
def test_overrides_turn_one_preset_into_another(name: str, start: str, tmp_path: Path) -> None:
    wanted = load_preset(name, tmp_path)
    current = load_preset(start, tmp_path).model_dump(mode="json")
    document = applied(tmp_path / "params.yaml", wanted, current)
    assert check_params(document, "params.yaml") == wanted
    if name == start:
        assert overrides(wanted, current) == []


# All that a path or name may hold; DVC itself gives `${` a meaning.
awkward = st.text(
    st.one_of(
        st.sampled_from("'\"\\[]{}(),:=$ #%&~!?*+|;<>`@/.-_\t"),
        st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="\ufeff"),
    ),
    max_size=12,
).filter(lambda text: "${" not in text)


@settings(max_examples=80, deadline=None)
@given(awkward, st.lists(awkward, max_size=3))
@example("\\", ["\\'", "\\\\'", "'\\"])
@example("", [""])
@example("null", ["true", "1e-5", "1", "[a]", "{a:b}", "~", "a,b"])
@example("My photos/it's (1)", ["Straße\\", ' "x" ', "a=b", "$HOME `ls` $(ls) !x"])
def test_any_text_survives_shell_and_hydra(
    tmp_path_factory: pytest.TempPathFactory, text: str, folders: list[str]
) -> None:
    source = {"kind": "folder", "name": "mine", "path": text, "positive_folders": folders}
    changes = {"data": {"sources": [source]}, "train": {"weights": text}}
    wanted = check_params(merge(DEFAULTS, changes), "x")
    current = {key: DEFAULTS[key] for key in ("data", "train")}
    file = tmp_path_factory.getbasetemp() / "overrides.yaml"
    document = applied(file, wanted, current | {"rest": "kept"} | DEFAULTS)
    assert document["train"]["weights"] == text
    assert check_params({k: v for k, v in document.items() if k != "rest"}, "x") == wanted


@settings(max_examples=30, deadline=None)
@given(
    st.floats(1e-9, 1e9, allow_nan=False, exclude_min=True),
    st.integers(1, 10**9),
    st.booleans(),
)
def test_any_number_survives(
    tmp_path_factory: pytest.TempPathFactory, rate: float, epochs: int, freeze: bool
) -> None:
    changes = {"train": {"learning_rate": rate, "epochs": epochs, "freeze_norm": freeze}}
    wanted = check_params(merge(DEFAULTS, changes), "x")
    file = tmp_path_factory.getbasetemp() / "numbers.yaml"
    assert check_params(applied(file, wanted, DEFAULTS), "x") == wanted


def test_merge_and_value() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    merged = merge(base, {"a": {"c": [3]}, "e": {"f": 5}})
    assert merged == {"a": {"b": 1, "c": [3]}, "d": 4, "e": {"f": 5}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert value(merged, "a.c") == [3]
    assert value(merged, "a.x") is None
    assert value(merged, "d.x") is None
