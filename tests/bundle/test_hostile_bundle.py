"""Bundles that somebody who knows how they are sealed has made: refused in one line, or served unchanged."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save, save_file

from streetvision.bundle.limits import MAX_FILE_BYTES, MAX_FILES, MAX_JSON_BYTES
from streetvision.bundle.predictor import Predictor
from streetvision.bundle.validate import BUNDLE_JSON, check_views, sealed
from streetvision.core.artifacts import json_text
from streetvision.core.errors import UserError
from tests.bundle.forging import Payload, forge, swap_when_hashed

if TYPE_CHECKING:
    from tests.conftest import Trained

GREY = Image.new("RGB", (48, 32), "grey")


@pytest.fixture
def bundle(tmp_path: Path, trained: Trained) -> Path:
    """A copy that a test may break."""
    shutil.copytree(trained.bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Predictor.load(folder, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------- pickles


def test_a_pickle_payload_is_never_run(bundle: Path, tmp_path: Path) -> None:
    expected = Predictor.load(bundle, "cpu")(GREY)
    mark = tmp_path / "pwned"
    for name in ("model.pth", "scrc_params.pkl"):
        (bundle / name).write_bytes(pickle.dumps(Payload(mark)))
    forge(bundle)
    assert Predictor.load(bundle, "cpu")(GREY) == expected
    for name in ("model.safetensors", "scrc_params.json"):
        shutil.copy(bundle / "model.pth", bundle / name)
        forge(bundle)
        assert name in refusal(bundle)
    assert not mark.exists()
    pickle.loads((bundle / "model.pth").read_bytes())
    assert mark.exists(), "the payload does nothing: the test would hold for any loader"


@pytest.mark.parametrize("name", ["model.pth", "scrc_params.pkl", "model.pt", "model"])
def test_weights_are_never_those_of_a_pickle(name: str, bundle: Path) -> None:
    forge(bundle, lambda document: document.update(model_checkpoint=name))
    assert f"model_checkpoint is '{name}'; it must match" in refusal(bundle)


# --------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("depth", [500, 990, 100_000])
@pytest.mark.parametrize("name", [BUNDLE_JSON, "scrc_params.json"])
def test_deep_json(name: str, depth: int, bundle: Path) -> None:
    deep = "[" * depth + "]" * depth
    if name == BUNDLE_JSON:
        (bundle / name).write_text(f'{{"policy": {deep}}}')
        refusal(bundle)
        document = json.loads('{"policy": %s}' % ("[" * 200 + "]" * 200))
        (bundle / name).write_text(json_text(sealed(document)))
        assert "lacks" in refusal(bundle)
    else:
        (bundle / name).write_text(f'{{"policy_type": "scrc", "scrc_params": {deep}}}')
        forge(bundle)
        assert "scrc_params.json" in refusal(bundle)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"x"', "{}", '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}',
     '{"a": "\\ud800"}', '{"a": 1, "a": 1}', f'{{"a": {"9" * 5000}}}', "\ufeff{}", '{"files": {}}'],
    ids=range(15),
)  # fmt: skip
def test_what_is_no_bundle_json(text: str, bundle: Path) -> None:
    (bundle / BUNDLE_JSON).write_text(text)
    assert BUNDLE_JSON in refusal(bundle)
    (bundle / "scrc_params.json").write_text(text)
    shutil.copy(bundle.parent / "bundle.json.whole", bundle / BUNDLE_JSON)
    forge(bundle)
    assert "scrc_params.json" in refusal(bundle)


@pytest.fixture(autouse=True)
def _whole(bundle: Path) -> None:
    shutil.copy(bundle / BUNDLE_JSON, bundle.parent / "bundle.json.whole")


def test_bytes_and_files_that_are_no_json(bundle: Path) -> None:
    (bundle / BUNDLE_JSON).write_bytes(b"\xff\xfe{}")
    assert "is not valid JSON" in refusal(bundle)
    with (bundle / BUNDLE_JSON).open("wb") as file:
        file.truncate(2**40)
    assert f"larger than {MAX_JSON_BYTES:,} bytes" in refusal(bundle)
    (bundle / BUNDLE_JSON).unlink()
    (bundle / BUNDLE_JSON).mkdir()
    assert "bundle.json is missing" in refusal(bundle)


# --------------------------------------------------------------------------- architecture and weights


def arguments(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["classifier"]["arguments"].update(values)


def views(
    grid: int, *, flip: bool, side: int, batch: int = 16
) -> Callable[[dict[str, Any]], object]:
    def change(document: dict[str, Any]) -> None:
        document["classifier"]["preprocessing"].update(height=side, width=side)
        document["views"].update(mode="simple_mean")
        document["views"]["grid"].update(grid=grid, flip=flip)
        document["batch_size"] = batch

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["classifier"].update(backbone="hf-hub:someone/model"), "it must match"),
        (lambda d: d["classifier"].update(backbone="local-dir:/tmp/model"), "it must match"),
        (lambda d: d["classifier"].update(backbone="nonesuch"), '"nonesuch" is no architecture of timm'),
        (lambda d: d["classifier"].update(backbone="vit_giant_patch14_dinov2"), "cannot be built"),
        (arguments(checkpoint_path="model.pth"), "arguments.checkpoint_path is unknown; allowed: channels"),
        (arguments(pretrained=True), "arguments.pretrained is unknown"),
        (arguments(pretrained_cfg_overlay="x"), "arguments.pretrained_cfg_overlay is unknown"),
        (arguments(img_size=[2048, 2048]), "img_size must be [32, 48]"),
        (arguments(channels=[8192] * 4), "far larger than its weights"),
        (arguments(layers=[8192] * 4), "far larger than its weights"),
        (arguments(layers=[10**9] * 4), "classifier.arguments.layers"),
        (arguments(layers=[1, 1, 1, 2]), "weights of another architecture"),
        (arguments(stem_width=-4), "cannot be built"),
        (arguments(stem_type={"a": 1}), "classifier.arguments.stem_type"),
        (lambda d: d["classifier"].update(head_hidden=4), "weights of another architecture"),
        (lambda d: d["classifier"].update(head_hidden=10**9), "head_hidden is 1000000000; it must be <="),
        (lambda d: d["classifier"]["preprocessing"].update(width=10**6), "width is 1000000; it must be"),
        (lambda d: d["classifier"]["preprocessing"].update(std=[0, 1, 1]), "std[0] is 0; it must be > 0"),
        (lambda d: d["views"]["grid"].update(grid=10**6), "views.grid.grid is 1000000; it must be <= 8"),
        (views(8, flip=True, side=2048), "130 views an image of 2048 x 2048 pixels are too many"),
        (views(8, flip=True, side=512), "130 views an image of 512 x 512 pixels are too many"),
        (lambda d: d.update(batch_size=10**9), "1000000000 images a batch of 48 x 32 pixels are too many"),
        (lambda d: d["views"].update(mode="mlp"), "views.mode mlp needs cvfm_weights"),
        (lambda d: d["views"].update(mode="topk_mean"), "mode topk_mean has the options top_k"),
        (lambda d: d.update(cvfm_weights="model.safetensors"), "views.mode single has no cvfm_weights"),
        (lambda d: d.update(parameters=5), "parameters is 5; the model has"),
        (lambda d: d.update(class_names=["Roadwork", "None"]), "class_names is"),
        (lambda d: d.update(format_version=2), "format_version is 2; it must be 1"),
        (lambda d: d.update(batch_size=0), "batch_size is 0; it must be >= 1"),
        (lambda d: d.update(surprise=1), "surprise is unknown; allowed: batch_size"),
        (lambda d: d["files"].update({BUNDLE_JSON: "0" * 64}), '"bundle.json" cannot be a file'),
        (lambda d: d["files"].update({"model.pth/x": "0" * 64}), '"model.pth" cannot be a file'),
        (lambda d: d["files"].update({"a\0b": "0" * 64}), "must stay inside the bundle"),
        (lambda d: d["files"].update({"": "0" * 64}), "must stay inside the bundle"),
        (lambda d: d["files"].update({"x": "ABC"}), "files.x is 'ABC'; it must match"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_memory_is_taken(
    change: Callable[[dict[str, Any]], object], message: str, bundle: Path
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forge(bundle, change)
    assert message in refusal(bundle)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_the_operations_of_all_views_are_bounded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streetvision.bundle import parts
    from streetvision.bundle.cost import forward_flops

    predictor = Predictor.load(bundle, "cpu")
    one = forward_flops(predictor.model, torch.zeros((1, 3, 32, 48), device="meta"))
    forge(bundle, views_of_the_bundle)
    monkeypatch.setattr(parts, "MAX_OPERATIONS", 5 * one)  # of four tiles and the whole
    Predictor.load(bundle, "cpu")
    monkeypatch.setattr(parts, "MAX_OPERATIONS", 5 * one - 1)
    assert "all views of an image take" in refusal(bundle)


def views_of_the_bundle(document: dict[str, Any]) -> None:
    document["views"].update(mode="simple_mean")
    document["views"]["grid"].update(grid=2)


def test_the_bounds_of_views_are_where_they_are_said(trained: Trained) -> None:
    document = json.loads((trained.bundle / BUNDLE_JSON).read_text())
    document["classifier"]["preprocessing"].update(height=2048, width=2048)
    document["batch_size"] = 8  # 2^25 pixels
    check_views(document)
    document["batch_size"] = 9
    with pytest.raises(UserError, match="9 images a batch"):
        check_views(document)
    document["views"].update(mode="simple_mean")
    document["views"]["grid"].update(grid=2)  # an image a pass: the batch plays no part
    check_views(document)
    document["views"]["grid"].update(flip=True)
    with pytest.raises(UserError, match="10 views an image"):
        check_views(document)


def test_a_file_that_is_too_large_is_not_read(bundle: Path) -> None:
    for name in ("model.pth", "model.safetensors", "scrc_params.json"):
        whole = (bundle / name).read_bytes()
        with (bundle / name).open("wb") as file:
            file.truncate(2**40)
        limit = MAX_JSON_BYTES if name == "scrc_params.json" else MAX_FILE_BYTES
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert f"{name} is larger than {limit:,} bytes" in refusal(bundle)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
        (bundle / name).write_bytes(whole)
    forge(bundle, lambda d: d["files"].update({str(n): "0" * 64 for n in range(MAX_FILES)}))
    assert f"it may have at most {MAX_FILES} keys" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.safetensors", "scrc_params.json"])
def test_what_was_hashed_is_what_is_loaded(
    name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Predictor.load(bundle, "cpu")(GREY)
    if name == "scrc_params.json":
        document = json.loads((bundle / name).read_text())
        document["scrc_params"]["served_prior"] = 0.9
        other = json_text(document).encode()
    else:
        state = load_file(bundle / name)
        other = save(state | {"head.bias": state["head.bias"] + 3})
    swap_when_hashed(monkeypatch, bundle / name, other)
    assert Predictor.load(bundle, "cpu")(GREY) == expected
    assert (bundle / name).read_bytes() == other, (
        "nothing was swapped: the test would hold for any code"
    )


def test_loading_in_threads_counts_for_each_alone(bundle: Path, trained: Trained) -> None:
    forge(bundle, arguments(channels=[8192] * 4))

    def load(number: int) -> str:
        try:
            Predictor.load((bundle, trained.bundle)[number % 2], "cpu")
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(load, range(8)))
    assert ["far larger" in each for each in said] == [True, False] * 4
    assert said[1::2] == [""] * 4
    torch.nn.Linear(3000, 3000)  # nothing is counted outside


def test_tensors_that_do_not_fit(bundle: Path) -> None:
    path = bundle / "model.safetensors"
    whole = load_file(path)

    def refused(**changed: torch.Tensor | None) -> str:
        state = {name: value for name, value in (whole | changed).items() if value is not None}
        save_file(state, path)
        forge(bundle)
        return refusal(bundle)

    assert "1 tensors missing" in refused(**{"head.bias": None})
    assert "1 unexpected" in refused(surprise=torch.zeros(1))
    assert "1 of another shape" in refused(**{"head.bias": torch.zeros(2)})
    # Finite, until it is a float32.
    assert "head.bias is of type float64" in refused(
        **{"head.bias": torch.tensor([1e300]).double()}
    )
    assert "not finite, in head.bias" in refused(**{"head.bias": torch.tensor([torch.inf])})
    # Finite, but no answer is.
    assert "the parts give no answer" in refused(**{"head.weight": torch.full((1, 64), 3e38)})


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\xff" * 100, bytes(100), b"\x02" + bytes(7) + b"{}"]
)
def test_files_that_are_no_safetensors(data: bytes, bundle: Path) -> None:
    (bundle / "model.safetensors").write_bytes(data)
    forge(bundle)
    refusal(bundle)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "cpu:x", "meta:-3"])
def test_a_device_that_is_not_there(device: str, trained: Trained) -> None:
    with pytest.raises(UserError, match=r"^device .* cannot be used|^params.yaml: hardware.device"):
        Predictor.load(trained.bundle, device)


# --------------------------------------------------------------------------- anything

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all keys and items below `value`."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    below = [paths_of(inner, (*path, key)) for key, inner in inside]
    return [path, *(each for paths in below for each in paths)]


def put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("name", [BUNDLE_JSON, "scrc_params.json"])
@pytest.mark.filterwarnings("ignore")
def test_any_value_anywhere_gives_an_answer_or_one_line(
    name: str, data: st.DataObject, bundle: Path
) -> None:
    whole = json.loads((bundle.parent / "bundle.json.whole").read_text())
    original = json.loads((bundle.parent / "policy").read_text()) if name != BUNDLE_JSON else whole
    document = copy.deepcopy(original)
    place = data.draw(st.sampled_from([path for path in paths_of(document) if path]))
    put(document, place, data.draw(VALUES))
    if name == BUNDLE_JSON:
        (bundle / name).write_text(json_text(sealed(document)))
    else:
        (bundle / name).write_text(json_text(document))
        (bundle / BUNDLE_JSON).write_text(json_text(whole))
        forge(bundle)
    said = ""
    answer = 0.5
    try:
        answer = Predictor.load(bundle, "cpu")(GREY)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert 0 <= answer <= 1
    assert np.isfinite(answer)


@pytest.fixture(autouse=True)
def _policy(bundle: Path) -> None:
    shutil.copy(bundle / "scrc_params.json", bundle.parent / "policy")
