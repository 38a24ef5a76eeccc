"""A bundle in onnxruntime: the answers of torch without torch, and int8 only where it costs little."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import matthews_corrcoef

from streetvision import cli
from streetvision.bundle import onnx_export, onnx_gate
from streetvision.bundle.engines import load_predictor, shipped_engines
from streetvision.bundle.export import export_bundle
from streetvision.bundle.natix.check import challenge_image, payload, running_miner
from streetvision.bundle.natix.install import install
from streetvision.bundle.natix.stand_in import make_checkout
from streetvision.bundle.onnx_gate import GateImages, compare, make_onnx
from streetvision.bundle.onnx_predictor import OnnxPredictor
from streetvision.bundle.onnx_session import Network, OnnxFusion
from streetvision.bundle.predictor import Predictor
from streetvision.bundle.timing import time_bundle
from streetvision.bundle.validate import BUNDLE_JSON, BundleValidator, sealed
from streetvision.core.artifacts import ArtifactSchema, json_text, read_json, sha256_file
from streetvision.core.errors import UserError
from streetvision.core.params import (
    Cvfm,
    Export,
    Hardware,
    Params,
    Subnet,
    ViewGrid,
    check_params,
)
from streetvision.data.store import open_split
from streetvision.decision.calibrators import PlattMap
from streetvision.decision.hard_images import HardImages
from streetvision.decision.policy import Policy
from streetvision.fusion.fusion import TRAINED, Fusion, FusionConfig, save_fusion
from streetvision.fusion.networks import build_network
from streetvision.models.classifier import load_classifier
from tests.bundle.forging import swap_when_hashed

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

if TYPE_CHECKING:
    from tests.conftest import Trained

CPU = torch.device("cpu")
GRID = ViewGrid(grid=2)
SETTINGS = Export(onnx=True, int8="static", max_mcc_drop=2)


@pytest.fixture(scope="module")
def photos(tiny_splits: dict[str, Path]) -> list[Image.Image]:
    split = open_split("evaluate", "val_test", tiny_splits["val_test"])
    return [split.image(row) for row in range(len(split))]


@pytest.fixture(scope="module")
def gate(tiny_splits: dict[str, Path]) -> GateImages:
    splits = [open_split("export", name, tiny_splits[name]) for name in ("val_calib", "val_select")]
    images = [partial(lambda each: map(each.image, range(len(each))), split) for split in splits]
    return GateImages(images[0], images[1], splits[1].labels, images[0])


def random_fusion(mode: str, width: int) -> Fusion:
    """A trained mode whose networks answer something; nothing is fitted."""
    settings = Cvfm(fits=2, hidden_layers=1, hidden_dim=8, latent_dim=8, attention_dim=8,
                    attention_heads=2)  # fmt: skip
    config = FusionConfig.of(mode, settings, GRID, width)
    network = build_network(config, torch.nn.Linear(width, 1))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in network.parameters():
            each.copy_(torch.randn(each.shape, generator=generator) / each.shape[-1] ** 0.5)
    return Fusion(config, network)


@dataclass(frozen=True)
class Exported:
    """Bundles with ONNX models, of one view and of four tiles with a trained fusion; their metrics."""

    single: Path
    fused: Path
    metrics: dict[str, Any]
    fused_metrics: dict[str, Any]


@pytest.fixture(scope="module")
def exported(
    trained: Trained, gate: GateImages, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    folder = tmp_path_factory.mktemp("onnx")
    save_fusion(random_fusion("mlp", 64), folder / "cvfm")

    def export(name: str, cvfm: Path, settings: Export) -> dict[str, Any]:
        return export_bundle(
            trained.classifier, trained.scrc_params, trained.scrc_pickle, folder / name, cvfm=cvfm,
            batch_size=16, make_tar=True,
            make_onnx=partial(make_onnx, settings=settings, images=gate),
        )  # fmt: skip

    metrics = export("single", trained.cvfm, SETTINGS)
    fused = export("fused", folder / "cvfm", Export(onnx=True))
    return Exported(folder / "single", folder / "fused", metrics, fused)


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(exported.single, tmp_path / "bundle")
    return tmp_path / "bundle"


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `bundle.json` as somebody would who knows how it is sealed."""
    document = json.loads((folder / BUNDLE_JSON).read_text())
    change(document)
    for name in document["files"]:
        document["files"][name] = sha256_file(folder / name)
    (folder / BUNDLE_JSON).write_text(json_text(sealed(document)))


def refusal(folder: Path, engine: str = "onnx") -> str:
    with pytest.raises(UserError) as caught:
        OnnxPredictor.load(folder, engine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("name", ["single", "fused"])
def test_onnx_answers_as_torch_does(
    name: str, exported: Exported, photos: list[Image.Image]
) -> None:
    folder = getattr(exported, name)
    torch_predictor = Predictor.load(folder, "cpu")
    predictor = OnnxPredictor.load(folder / "bundle.tar.gz")
    expected = torch_predictor.logits(photos)
    found = predictor.logits(photos)
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-5)
    decide = predictor.policy.decide
    np.testing.assert_array_equal(decide(found), decide(expected))
    one_by_one = np.array([predictor.logits([image])[0] for image in photos[:8]])
    np.testing.assert_allclose(one_by_one, found[:8], atol=1e-5)
    probability = predictor(np.asarray(photos[0]))
    assert probability == pytest.approx(torch_predictor(photos[0]), abs=1e-5)
    assert predictor.logits([]).shape == (0,)


@pytest.mark.parametrize("name", ["single", "fused"])
def test_a_second_pass_is_honoured(
    name: str, exported: Exported, photos: list[Image.Image]
) -> None:
    folder = getattr(exported, name)
    torch_predictor, predictor = Predictor.load(folder, "cpu"), OnnxPredictor.load(folder)
    single = replace(predictor.policy, hard_images=HardImages(-1e6, -1e6 + 1))
    predictor.policy = single
    easy = predictor.logits(photos)
    hard = HardImages(*np.quantile(easy, [0.3, 0.7]))
    for each in (torch_predictor, predictor):
        each.policy = replace(each.policy, hard_images=hard)
    found = predictor.logits(photos)
    np.testing.assert_allclose(found, torch_predictor.logits(photos), atol=2e-5)
    changed = np.abs(found - easy) > 1e-4
    assert changed.sum() == (hard.chosen(easy).sum() if name == "fused" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", TRAINED)
def test_every_trained_fusion_runs_in_onnxruntime(mode: str) -> None:
    fusion = random_fusion(mode, 12)
    assert fusion.network is not None
    exported = onnx_export.export_fusion(fusion.network, fusion.n_views, 12)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.5, (6, 5, 2))
    boxes = np.concatenate([corner, corner + 0.4], axis=2)
    boxes[:, 0] = (0, 0, 1, 1)
    content = np.ones((6, 5))
    content[2, 3:] = 0
    content[4, 1:] = 0  # no tile at all
    views = (rng.normal(size=(6, 5)), rng.normal(size=(6, 5, 12)), content, boxes)
    expected = fusion.fuse(*views)
    ported = OnnxFusion(fusion.config, exported, Path("fusion.onnx"))
    np.testing.assert_allclose(ported.fuse(*views), expected, atol=1e-5)
    first = ported.fuse(*(each[:1] for each in views))
    np.testing.assert_allclose(first, expected[:1], atol=1e-5)
    assert expected.std() > 0.01


WITHOUT_TORCH = """
import json, sys
for name in ("torch", "torchvision", "timm"):
    sys.modules[name] = None  # importing it raises
from streetvision.bundle.onnx_predictor import OnnxPredictor
answers = [OnnxPredictor.load(sys.argv[1])(path) for path in sys.argv[2:]]
from streetvision.cli import main
main(["predict", *sys.argv[1:], "--engine", "onnx"])
print(json.dumps(answers))
"""


@pytest.mark.parametrize("name", ["single", "fused"])
def test_no_torch_is_needed(
    name: str, exported: Exported, photos: list[Image.Image], tmp_path: Path, repository: Path
) -> None:
    paths = []
    for number, image in enumerate(photos[:4]):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    folder = getattr(exported, name)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder), *map(str, paths)],
        cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, answers = done.stdout.splitlines()
    expected = Predictor.load(folder, "cpu").probabilities(paths)
    np.testing.assert_allclose(json.loads(answers), expected, atol=1e-5)
    np.testing.assert_allclose([float(line.split()[0]) for line in lines], expected, atol=1e-5)


def test_threads_get_their_own_answers(exported: Exported, photos: list[Image.Image]) -> None:
    predictor = OnnxPredictor.load(exported.fused)
    expected = [predictor(image) for image in photos]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(predictor, photos * 3)) == expected * 3


def test_a_miner_serves_it_as_any_other(exported: Exported, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    install(exported.fused, checkout)
    assert not list(checkout.rglob("*.onnx"))
    image = challenge_image(0)
    with running_miner(checkout) as miner:
        answer = miner.ask(payload(image))
    assert answer.error == ""
    for engine in ("torch", "onnx"):
        predictor = load_predictor(exported.fused, engine, "cpu")
        assert predictor(image) == pytest.approx(answer.prediction, abs=1e-5)


# --------------------------------------------------------------------------- content


def test_the_files_are_named_hashed_and_measured(exported: Exported) -> None:
    document = read_json(exported.single / BUNDLE_JSON, "export")
    files = {"onnx_model": "model.onnx", "onnx_int8_model": "model.int8.onnx"}
    assert {key: document.get(key) for key in files} == files
    assert "onnx_fusion" not in document
    for name in files.values():
        assert document["files"][name] == sha256_file(exported.single / name)
    assert shipped_engines(exported.single) == ["torch", "onnx", "onnx_int8"]
    assert shipped_engines(exported.fused) == ["torch", "onnx"]
    assert read_json(exported.fused / BUNDLE_JSON, "export")["onnx_fusion"] == "fusion.onnx"
    metrics = exported.metrics
    assert metrics["files"] == len(document["files"]) + 1
    assert metrics["onnx"]["bytes"] == (exported.single / "model.onnx").stat().st_size
    assert metrics["onnx"]["images"] == 40
    assert metrics["onnx"]["changed_decisions"] == 0
    assert 0 < metrics["onnx"]["max_logit_difference"] < 1e-4
    int8 = metrics["onnx_int8"]
    assert int8["kind"] == "static"
    assert int8["shipped"] is True
    assert int8["bytes"] < 0.6 * metrics["onnx"]["bytes"]
    assert int8["max_logit_difference"] > metrics["onnx"]["max_logit_difference"]
    assert int8["mcc_drop"] == pytest.approx(int8["torch_mcc"] - int8["mcc"])
    assert "onnx_int8" not in exported.fused_metrics


def test_the_model_says_nothing_of_the_machine_that_made_it(
    exported: Exported, repository: Path
) -> None:
    for path in exported.single.glob("*.onnx"):
        data = path.read_bytes()
        for word in (str(repository), "site-packages", ".py", "/tmp"):
            assert word.encode() not in data, (path.name, word)


@pytest.mark.slow
def test_two_exports_are_equal_to_the_byte(exported: Exported, trained: Trained) -> None:
    model, config = load_classifier(trained.classifier)
    again = onnx_export.export_network(model, config.preprocessing, features=False)
    assert again == (exported.single / "model.onnx").read_bytes()


def test_int8_answers_nearly_as_torch_does(
    exported: Exported, trained: Trained, photos: list[Image.Image]
) -> None:
    expected = Predictor.load(exported.single, "cpu").logits(photos)
    found = load_predictor(exported.single, "onnx_int8").logits(photos)
    assert np.abs(found - expected).max() > 1e-6
    assert rms(found - expected) < 0.3 * expected.std()
    _, config = load_classifier(trained.classifier)
    model = (exported.single / "model.onnx").read_bytes()
    small = onnx_export.quantise(model, "dynamic", [])
    assert small == onnx_export.quantise(model, "dynamic", [])
    kinds = {node.op_type for node in onnx.load_from_string(small).graph.node}
    assert "MatMulInteger" in kinds, "nothing was quantised"
    dynamic = Network(small, Path("model.onnx"), config.preprocessing, features=False)
    inputs = [config.preprocessing.apply(image) for image in photos]
    assert rms(dynamic(inputs)[0] - expected) < 0.2 * expected.std()


def rms(values: np.ndarray[Any, np.dtype[np.floating[Any]]]) -> float:
    """Root mean square: a single image near a quantisation step moves it little."""
    return float(np.sqrt(np.mean(values**2)))


# --------------------------------------------------------------------------- the gate


def test_comparison_by_hand() -> None:
    policy = Policy(PlattMap(1.0, 0.0), 0.5, 0.5)
    found = compare(policy, np.array([-1.0, 0.5, 2.0, 0.0]), np.array([-1.5, -0.1, 2.25, 1e-9]))
    assert found == {
        "images": 4, "max_logit_difference": pytest.approx(0.6), "changed_decisions": 2,
    }  # fmt: skip


@pytest.fixture
def no_export(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter returns what it made before: it takes seconds."""
    model = (exported.single / "model.onnx").read_bytes()
    monkeypatch.setattr(onnx_gate, "export_network", lambda *_, **__: model)


@pytest.mark.usefixtures("no_export")
def test_a_model_that_answers_differently_stops_the_export(
    exported: Exported, gate: GateImages, tmp_path: Path
) -> None:
    predictor = Predictor.load(exported.single, "cpu")
    logits = np.sort(predictor.logits(gate.calib()))
    with torch.no_grad():
        predictor.model.head.bias += 0.01
    # All decisions are roadwork, before and after.
    predictor.policy = Policy(PlattMap(1.0, 1.0 - float(logits[0])), 0.5, 0.5)
    with pytest.raises(UserError, match=r"up to 0\.01 \(.* allows 0\.001\) and 0 of 40 decisions"):
        make_onnx(predictor, tmp_path, SETTINGS, gate)
    assert not list(tmp_path.iterdir())
    wide = SETTINGS.model_copy(update={"max_logit_difference": 1.0, "int8": "none"})
    assert make_onnx(predictor, tmp_path, wide, gate).metrics["onnx"]["changed_decisions"] == 0
    # A difference that is allowed may still change no decision.
    edge = float(logits[20]) + 0.005
    predictor.policy = Policy(PlattMap(1.0, -edge), 0.5, 0.5)
    changed = int(((logits <= edge) & (logits + 0.01 > edge)).sum())
    assert changed > 0
    with pytest.raises(UserError, match=rf"and {changed} of 40 decisions change \(0 may\)"):
        make_onnx(predictor, tmp_path, wide, gate)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_export")
def test_int8_that_costs_too_much_is_not_shipped(
    exported: Exported,
    gate: GateImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def ruined(model: bytes, *_: object) -> bytes:
        """The head's weights negated."""
        document = onnx.load_from_string(model)
        head = next(
            each for each in document.graph.initializer if each.name.endswith("head.weight")
        )
        values = onnx.numpy_helper.to_array(head)
        head.CopyFrom(onnx.numpy_helper.from_array(-values, head.name))
        return bytes(document.SerializeToString())

    monkeypatch.setattr(onnx_gate, "quantise", ruined)
    predictor = Predictor.load(exported.single, "cpu")
    strict = SETTINGS.model_copy(update={"max_mcc_drop": 0.01})
    parts = make_onnx(predictor, tmp_path, strict, gate)
    assert parts.files == {"onnx_model": "model.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    int8 = parts.metrics["onnx_int8"]
    assert int8["shipped"] is False
    assert int8["mcc_drop"] > 0.1
    assert "static int8 is not shipped: MCC on VAL_SELECT falls from" in caplog.text


def test_ranges_are_taken_from_anywhere_in_val_calib(
    tmp_path: Path, write_split: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import export
    from stages.common import Stage

    monkeypatch.setattr(onnx_gate, "RANGE_IMAGES", 40)
    paths = ArtifactSchema(tmp_path)
    paths.ensure_dirs()
    # The groups, of both classes, one after the other, as a source gives them.
    for seed, name in enumerate(("val_calib", "val_select")):
        write_split(paths.split(name), 120, seed=seed)
    policy = {"fit_on": "clean"}
    found = export._images(Stage("export", check_params({"decision": policy}, "test"), paths))
    for name, images in (("val_calib", found.calib()), ("val_select", found.select())):
        split = open_split("export", name, paths.split(name))
        expected = [split.image(row).tobytes() for row in range(120)]
        assert [image.tobytes() for image in images] == expected
    calib = [image.tobytes() for image in found.calib()]
    rows = [calib.index(image.tobytes()) for image in found.ranges()]
    assert len(set(rows)) == 40
    assert rows == [calib.index(image.tobytes()) for image in found.ranges()]
    assert all(10 <= sum(part <= row < part + 60 for row in rows) <= 30 for part in (0, 60))
    # No period, such as that of labels, which alternate here.
    assert 10 <= sum(row % 2 for row in rows) <= 30


@pytest.mark.usefixtures("no_export")
def test_each_step_of_the_gate_sees_its_own_images(
    exported: Exported, gate: GateImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges are of VAL_CALIB: an int8 model that had seen VAL_SELECT would be judged on what it knows."""

    def pixels(images: Iterable[Any]) -> list[bytes]:
        return [np.asarray(image).tobytes() for image in images]

    asked: dict[str, list[bytes]] = {}
    compared: list[list[bytes]] = []
    real = onnx_gate.logits_of

    def quantise(model: bytes, _: str, inputs: Iterable[Any]) -> bytes:
        asked["ranges"] = pixels(view for views in inputs for view in views)
        return model

    def logits_of(predictors: Any, images: Iterable[Image.Image]) -> Any:
        found = list(images)
        compared.append(pixels(found))
        return real(predictors, found)

    monkeypatch.setattr(onnx_gate, "quantise", quantise)
    monkeypatch.setattr(onnx_gate, "logits_of", logits_of)
    predictor = Predictor.load(exported.single, "cpu")
    some = list(gate.calib())[3:7]
    make_onnx(predictor, tmp_path, SETTINGS, replace(gate, ranges=lambda: some))
    assert compared == [pixels(gate.calib()), pixels(gate.select())]
    assert asked["ranges"] == pixels(predictor.preprocessing.apply(image) for image in some)


@pytest.mark.usefixtures("no_export")
def test_int8_is_judged_at_the_served_prior(
    exported: Exported, gate: GateImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scikit-learn's MCC with the weights written out."""
    monkeypatch.setattr(onnx_gate, "quantise", lambda model, *_: model)
    predictor = Predictor.load(exported.single, "cpu")
    predictor.policy = replace(predictor.policy, served_prior=0.2)
    decided = predictor.policy.decide(predictor.logits(gate.select()))
    labels = decided.astype(np.int64)
    labels[np.flatnonzero(decided)[::3]] = 0  # false alarms, and fewer missed
    labels[np.flatnonzero(~decided.astype(bool))[::7]] = 1
    share = labels.mean()
    weights = np.where(labels == 1, 0.2 / share, 0.8 / (1 - share))
    expected = matthews_corrcoef(labels, decided, sample_weight=weights)
    judged = replace(gate, labels=labels)
    found = make_onnx(predictor, tmp_path, SETTINGS, judged).metrics["onnx_int8"]
    assert found["torch_mcc"] == found["mcc"] == pytest.approx(expected)
    # Far beyond rounding, however the tiny network was trained on this processor.
    assert abs(expected - matthews_corrcoef(labels, decided)) > 1e-3


@pytest.mark.usefixtures("no_export")
def test_the_stage(
    exported: Exported,
    trained: Trained,
    tiny_splits: dict[str, Path],
    tmp_path: Path,
    repository: Path,
) -> None:
    from stages.common import Stage
    from stages.export import export

    paths = ArtifactSchema(tmp_path)
    paths.ensure_dirs()
    shutil.copy(repository / "dvc.yaml", tmp_path)
    shutil.copytree(trained.classifier, paths.classifier)
    shutil.copytree(trained.cvfm, paths.cvfm)
    for source in (trained.scrc_params, trained.scrc_pickle):
        shutil.copy(source, paths.scrc_params.parent)
    for name in ("val_select", "val_calib"):
        shutil.copy(tiny_splits[name], paths.split(name))
    params = Params(hardware=Hardware(workers=1), export=SETTINGS, subnet=Subnet(validator="crop"))
    export(Stage("export", params, paths))
    BundleValidator().validate(paths.bundle)
    metrics = read_json(paths.metric("export"), "export")
    # The images are distorted, as the default policy's are.
    assert metrics["onnx"]["images"] == metrics["onnx_int8"]["images"] == 40
    assert metrics["onnx"] != exported.metrics["onnx"]
    assert metrics["flops"] == exported.metrics["flops"] > 0
    written = {each["path"] for each in read_json(paths.manifest("export"), "export")["outputs"]}
    assert {"models/bundle/model.onnx", "models/bundle/model.int8.onnx"} <= written
    assert not paths.export_timing.exists()
    # An old model does not stay.
    export(Stage("export", params.model_copy(update={"export": Export()}), paths))
    assert not list(paths.bundle.glob("*.onnx"))
    assert "onnx" not in read_json(paths.metric("export"), "export")


# --------------------------------------------------------------------------- refusals


def test_a_bundle_without_onnx_says_how_to_make_one(trained: Trained, exported: Exported) -> None:
    assert "has no onnx_model: it was exported without export.onnx" in refusal(trained.bundle)
    assert "exported without export.int8" in refusal(exported.fused, "onnx_int8")
    with pytest.raises(UserError, match='engine "tensorrt" is not one of torch, onnx, onnx_int8'):
        load_predictor(exported.single, "tensorrt")
    with pytest.raises(UserError, match="onnx runs on the CPU"):
        load_predictor(exported.single, "onnx", "cuda")
    assert isinstance(load_predictor(exported.single, device="cpu"), Predictor)


def test_changed_and_missing_models_are_refused(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    assert "model.onnx was changed after export" in refusal(bundle)
    (bundle / "model.onnx").unlink()
    assert "file model.onnx is missing" in refusal(bundle)
    document = json.loads((bundle / BUNDLE_JSON).read_text())
    document["files"].pop("model.onnx")
    (bundle / BUNDLE_JSON).write_text(json_text(sealed(document)))
    assert '"model.onnx" has no SHA-256 in files' in refusal(bundle)


def test_models_that_do_not_fit_are_refused(bundle: Path, exported: Exported) -> None:
    good = (bundle / "model.onnx").read_bytes()

    def with_model(data: bytes) -> str:
        (bundle / "model.onnx").write_bytes(data)
        forge(bundle, lambda _: None)
        return refusal(bundle)

    assert "cannot be run by onnxruntime" in with_model(b"no model")
    assert "cannot be run by onnxruntime" in with_model(good[: len(good) // 2])
    fusion = (exported.fused / "fusion.onnx").read_bytes()
    assert "are needed" in with_model(fusion)
    assert "are needed" in with_model((exported.fused / "model.onnx").read_bytes())
    document = onnx.load_from_string(good)
    for each in document.graph.initializer:
        if each.name.endswith("head.weight"):
            values: NDArray[np.float32] = onnx.numpy_helper.to_array(each) * np.float32(np.nan)
            each.CopyFrom(onnx.numpy_helper.from_array(values, each.name))
    assert "give no answer" in with_model(bytes(document.SerializeToString()))
    (bundle / "model.onnx").write_bytes(good)
    forge(bundle, lambda d: d["classifier"]["preprocessing"].update(width=64))
    assert "are needed" in refusal(bundle)


@pytest.mark.parametrize("place", ["weights.bin", "../secret.bin", "{folder}/secret.bin"])
def test_no_other_file_is_read(bundle: Path, place: str) -> None:
    document = onnx.load(bundle / "model.onnx")
    head = next(each for each in document.graph.initializer if each.name.endswith("head.weight"))
    for path in (bundle / "weights.bin", bundle.parent / "secret.bin"):
        path.write_bytes(head.raw_data)
    head.ClearField("raw_data")
    head.data_location = onnx.TensorProto.EXTERNAL
    location = head.external_data.add()
    location.key, location.value = "location", place.format(folder=bundle.parent)
    (bundle / "model.onnx").write_bytes(document.SerializeToString())
    forge(bundle, lambda _: None)
    assert "names data in another file" in refusal(bundle)
    with pytest.raises(UserError, match="names data in another file"):
        BundleValidator().validate(bundle)


def test_what_was_hashed_is_what_runs(
    bundle: Path, photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = OnnxPredictor.load(bundle).logits(photos[:2])
    document = onnx.load(bundle / "model.onnx")
    head = next(each for each in document.graph.initializer if each.name.endswith("head.weight"))
    values = onnx.numpy_helper.to_array(head)
    head.CopyFrom(onnx.numpy_helper.from_array(-values, head.name))
    swap_when_hashed(monkeypatch, bundle / "model.onnx", document.SerializeToString())
    np.testing.assert_array_equal(OnnxPredictor.load(bundle).logits(photos[:2]), expected)


def test_fusion_and_its_model_go_together(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.fused, tmp_path / "bundle")
    bundle = tmp_path / "bundle"
    forge(bundle, lambda d: d.pop("onnx_fusion"))
    assert "views.mode mlp needs onnx_fusion" in refusal(bundle)
    forge(bundle, lambda d: d.update(onnx_fusion="model.onnx"))
    assert "are needed" in refusal(bundle)
    forge(bundle, lambda d: d.update(onnx_fusion="../model.onnx"))
    assert "must stay inside the bundle" in refusal(bundle)


def test_what_is_not_installed_is_named(
    exported: Exported, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = load_classifier(trained.classifier)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"export.onnx needs onnxscript: pip install"):
        onnx_export.export_network(model, config.preprocessing, features=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "needs onnxruntime: pip install 'streetvision[onnx]'" in refusal(exported.single)


def test_an_architecture_that_cannot_be_exported(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exported: Exported
) -> None:
    model, config = load_classifier(trained.classifier)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no translation\nfor aten.odd")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"as ONNX: no translation for aten\.odd"):
        onnx_export.export_network(model, config.preprocessing, features=False)
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="2 GiB"):
        onnx_export.quantise((exported.single / "model.onnx").read_bytes(), "dynamic", [])


def test_int8_needs_onnx() -> None:
    with pytest.raises(ValueError, match="int8 static needs onnx: true"):
        Export(int8="static")


# --------------------------------------------------------------------------- commands


def test_predict_with_an_engine(
    exported: Exported,
    photos: list[Image.Image],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos[0].save(tmp_path / "one.png")
    answers = []
    for engine in ("torch", "onnx"):
        command = ["predict", str(exported.single), str(tmp_path / "one.png"), "--engine", engine]
        assert cli.main(command) == 0
        answers.append(float(capsys.readouterr().out.split()[0]))
    assert answers[0] == pytest.approx(answers[1], abs=2e-6)
    assert cli.main([*command[:-1], "tensorrt"]) == 2
    assert 'engine "tensorrt" is not one of' in capsys.readouterr().err


def test_timing(
    exported: Exported, trained: Trained, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    found = time_bundle(exported.single, ["onnx"], 20)["onnx"]
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] < 1e5
    assert found["load_ms"] > 0
    assert found["images"] == 20
    if Path("/proc/self/status").exists():
        assert 10 < found["peak_memory_mb"] < 1000
    with pytest.raises(UserError, match=r"with onnx failed: .*has no onnx_model"):
        time_bundle(trained.bundle, ["onnx"], 1)
