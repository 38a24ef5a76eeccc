"""The installed detector, alone in a process, gives the Predictor's probabilities.

With MINER_PYTHON, the interpreter of another environment, the detector runs there (tests/compat).
"""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from streetvision.bundle.export import export_bundle
from streetvision.bundle.natix import miner
from streetvision.bundle.natix.check import payload, running_miner
from streetvision.bundle.natix.install import CONFIG, DETECTOR, install
from streetvision.bundle.natix.layout import LAYOUTS
from streetvision.bundle.natix.stand_in import make_checkout
from streetvision.bundle.predictor import Predictor
from streetvision.core.artifacts import write_bytes_atomic, write_json_atomic
from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, ViewGrid
from streetvision.data import pixels
from streetvision.data.transforms import Preprocessing
from streetvision.decision.abstention import Abstention
from streetvision.decision.choice import DEPLOYABLE, fit_kind
from streetvision.decision.ensemble import TIERS
from streetvision.decision.hard_images import HardImages
from streetvision.decision.pickling import dump_policy_pickle
from streetvision.decision.policy import Policy, scrc_document
from streetvision.fusion.fusion import TRAINED, UNTRAINED, Fusion, FusionConfig, save_fusion
from streetvision.fusion.networks import build_network, freeze_head
from streetvision.models.backbone import resolve
from streetvision.models.classifier import ClassifierConfig, save_classifier
from streetvision.prepare.decode import decode_image
from tests.data.odd_images import bombs, in_png, png_chunk, rare_modes, spoilt_metadata

if TYPE_CHECKING:
    from tests.conftest import Trained

MINER_PYTHON = os.environ.get("MINER_PYTHON", sys.executable)
# Between Pillow 10 and 13 a pixel in a hundred of a resized image moves by 1.
TOLERANCE = 1e-6 if sys.executable == MINER_PYTHON else 2e-3
# As in torch 2.2 beside numpy 2, where no array becomes a tensor nor the other way round.
NO_BRIDGE = """
def refuse(*_):
    raise RuntimeError("Numpy is not available")
torch.from_numpy = torch.as_tensor = torch.Tensor.numpy = torch.Tensor.__array__ = refuse
made = torch.tensor
def from_python_alone(data, *arguments, **options):
    if type(data).__module__ == "numpy":
        refuse()
    return made(data, *arguments, **options)
torch.tensor = from_python_alone
"""
SOURCE = Path(miner.__file__).with_name(DETECTOR)
DETECTORS = LAYOUTS[0].detectors
PROGRAM = f"""
import json, sys
for module in {miner.ABSENT}:
    sys.modules[module] = None
sys.path.insert(0, sys.argv[1])
sys.stdout, answers = sys.stderr, sys.stdout
import natix.miner.detectors, torch
from natix.miner.registry import DETECTOR_REGISTRY
from PIL import Image
torch.set_num_threads(1)
{NO_BRIDGE}
found = []
for case in json.load(sys.stdin):
    try:
        detector = DETECTOR_REGISTRY["StreetVision"](config_name=case["config"], device="cpu")
        found.append([detector(Image.open(path)) for path in case["images"]])
        assert all(type(value) is float for value in found[-1])
    except Exception as error:
        found.append(f"{{type(error).__name__}}: {{error}}")
json.dump(found, answers)
answers.flush()
"""
EMPTY = {"metrics": {"before": {}, "after": None}}


def served(checkout: Path, cases: list[tuple[str, list[Path]]]) -> list[list[float] | str]:
    """What the detectors of a checkout answer, by the names of their YAML files; or their error."""
    document = [{"config": name, "images": [str(path) for path in paths]} for name, paths in cases]
    done = subprocess.run(
        [MINER_PYTHON, "-I", "-c", PROGRAM, str(checkout)],
        input=json.dumps(document), capture_output=True, text=True, check=False,
        env={"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: list[list[float] | str] = json.loads(done.stdout)
    return answers


def upright(path: Path) -> Image.Image:
    """The image as this project decodes it everywhere, at its own size."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        side = min(image.size)
    return decode_image(data, side_px=side, max_pixels=10**8).image


# --------------------------------------------------------------------------- random bundles


@dataclass(frozen=True)
class Case:
    """A bundle that a seed draws, and what it is made of."""

    bundle: Path
    mode: str
    kind: str
    grid: ViewGrid
    fit: str
    hard: bool


def random_policy(rng: np.random.Generator, kind: str, *, hard: bool) -> Policy:
    truth = rng.random(80) < 0.6
    logits = rng.normal(np.where(truth, 0.4, -0.2), 0.6)  # served ones lie on both sides, too
    groups = rng.integers(0, 16, 80)
    prior, shift = rng.uniform(0.2, 0.8), rng.choice([0.0, rng.normal()])
    return Policy(
        fit_kind(kind, logits, truth, groups, 0, 0.5), float(truth.mean()), prior, float(shift),
        Abstention("scrc_t", "error", 0.05, None, 8, 0.1), "served",
        HardImages(*np.sort(rng.normal(0, 1.5, 2)).tolist()) if hard else None,
    )  # fmt: skip


def randomised(module: torch.nn.Module, generator: torch.Generator, scale: float) -> None:
    """Move parameters and statistics so that nothing is at its neutral start."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            positive = name.endswith(("running_var", "deviation"))
            value.copy_(0.5 + drawn.abs() if positive else value + scale * drawn)


def random_bundle(folder: Path, seed: int) -> Case:
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    modes, kinds = (*UNTRAINED, *TRAINED), (*DEPLOYABLE, *TIERS)
    mode, kind = modes[seed % len(modes)], kinds[seed % len(kinds)]
    vit, mobilenet = seed % 5 == 4, seed % 9 == 6
    height, width = (32, 48) if vit else (int(rng.integers(20, 50)), int(rng.integers(20, 50)))
    backbone = "street_vit" if vit else "street_resnet_tiny"
    if mobilenet:  # its head keeps a hidden layer
        backbone = "mobilenetv4_conv_small_035"
    name, arguments, mean, std = resolve(backbone, height, width)
    fit = ("letterbox", "crop")[seed // len(modes) % 2]
    preprocessing = Preprocessing(height, width, fit, mean, std)  # type: ignore[arg-type]
    hidden = None if mode == "latent" or seed % 3 else 5
    config = ClassifierConfig(name, arguments, preprocessing, hidden)
    torch.manual_seed(seed)
    model = config.build().eval()
    randomised(model, generator, 0.02 if mobilenet else 0.2)
    with torch.no_grad():  # logits of about unit spread, whatever the network
        inputs = torch.rand((8, 3, height, width), generator=generator) * 4 - 2
        found = model(inputs)[0]
        model.head.weight.div_(found.std())
        model.head.bias.copy_((model.head.bias - found.mean()) / found.std())
    save_classifier(model, config, folder / "classifier")
    options = {
        "grid": int(rng.integers(1 + (mode in TRAINED), 4)),
        "growth": float(rng.uniform(0, 0.6)),
    }
    grid = ViewGrid(**options, flip=bool(rng.integers(2)))
    settings = Cvfm(
        top_k=int(rng.integers(1, 6)), temperature=float(rng.uniform(0.5, 2)), fits=1 + seed // 8 % 2,
        hidden_layers=seed % 3, hidden_dim=6, latent_dim=7, attention_dim=8, attention_heads=2,
    )  # fmt: skip
    fusion = FusionConfig.of(mode, settings, grid, int(model.backbone.num_features))  # type: ignore[arg-type]
    network = None
    if mode in TRAINED:
        network = build_network(fusion, freeze_head(model.head))
        heads = {name for name in network.state_dict() if "head" in name.split(".")}
        kept = {name: network.state_dict()[name].clone() for name in heads}
        randomised(network, generator, 0.5)
        network.load_state_dict(kept, strict=False)
    save_fusion(Fusion(fusion, network), folder / "cvfm")
    hard = seed // 3 % 3 == 1
    document = scrc_document(random_policy(rng, kind, hard=hard), EMPTY)
    write_json_atomic(folder / "scrc_params.json", document)
    write_bytes_atomic(folder / "scrc_params.pkl", dump_policy_pickle(document))
    export_bundle(
        folder / "classifier", folder / "scrc_params.json", folder / "scrc_params.pkl",
        folder / "bundle", cvfm=folder / "cvfm", batch_size=4, make_tar=False,
    )  # fmt: skip
    return Case(folder / "bundle", mode, kind, fusion.grid, fit, hard)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of many shapes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    paths = []
    for number, size in enumerate([(224, 224), (61, 40), (17, 90), (48, 32), (300, 31), (33, 33)]):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


CASES = 28  # each mode with each calibrator's neighbours, in every kind of grid


def test_the_detector_is_the_predictor(
    tmp_path_factory: pytest.TempPathFactory, pictures: list[Path]
) -> None:
    folder = tmp_path_factory.mktemp("random")
    checkout = make_checkout(folder / "checkout")
    cases = []
    for seed in range(CASES):
        cases.append(random_bundle(folder / str(seed), seed))
        install(cases[-1].bundle, checkout)
        configs = checkout / DETECTORS / "configs"
        shutil.copyfile(configs / CONFIG, configs / f"{seed}.yaml")
    found = served(checkout, [(f"{seed}.yaml", pictures) for seed in range(CASES)])
    images = [upright(path) for path in pictures]
    spreads = []
    for case, answers in zip(cases, found, strict=True):
        predictor = Predictor.load(case.bundle, "cpu")
        expected = np.array([predictor(image) for image in images])
        spreads.append(expected.std())
        np.testing.assert_allclose(answers, expected, rtol=0, atol=TOLERANCE, err_msg=str(case))
    assert np.median(spreads) > 0.03, "all answers are alike: the test would hold for any code"
    assert {case.mode for case in cases} == {*UNTRAINED, *TRAINED}
    assert {case.kind for case in cases} == {*DEPLOYABLE, *TIERS}
    assert {case.fit for case in cases} == {"letterbox", "crop"}
    assert {case.grid.grid for case in cases} == {1, 2, 3}


# --------------------------------------------------------------------------- image files


def files(folder: Path) -> list[Path]:
    """One picture in the modes and orientations that JPEG, PNG and WebP files have."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((60, 44), Image.Resampling.BICUBIC)
    alpha = Image.fromarray(rng.integers(0, 256, (44, 60), dtype=np.uint8))
    clear = image.copy()
    clear.putalpha(alpha)
    palette = image.quantize(16)
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "grey.jpg": (image.convert("L"), {}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "grey.png": (image.convert("L"), {}),
        "one_bit.png": (image.convert("1"), {}),
        "grey_alpha.png": (clear.convert("LA"), {}),
        "rgba.png": (clear, {}),
        "palette.png": (palette, {}),
        "palette_clear.png": (palette, {"transparency": 3}),
        "rgb_clear.png": (image, {"transparency": image.getpixel((0, 0))}),
        "deep.png": (Image.fromarray(rng.integers(0, 65536, (44, 60), dtype=np.uint16)), {}),
        "rgba.webp": (clear, {"lossless": True}),
        "animated.webp": (image, {"save_all": True, "append_images": [image.rotate(180)]}),
    }
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        made[f"exif_{orientation}.jpg"] = (image, {"exif": exif})
        made[f"exif_{orientation}.png"] = (image, {"exif": exif})
    made["broken_exif.jpg"] = (image, {"exif": b"Exif\x00\x00MM\x00*garbage"})
    for name, (one, options) in made.items():
        one.save(folder / name, **options)
    return [folder / name for name in made]


def test_every_mode_and_orientation(tmp_path: Path, trained: Trained) -> None:
    paths = files(tmp_path)
    checkout = make_checkout(tmp_path / "checkout")
    install(trained.bundle, checkout)
    (found,) = served(checkout, [(CONFIG, paths)])
    predictor = Predictor.load(trained.bundle, "cpu")
    expected = [predictor(upright(path)) for path in paths]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert len(np.unique(np.round(expected, 7))) >= 15, "the files must not all look alike"


def test_odd_and_hostile_files_get_the_predictors_answers(tmp_path: Path, trained: Trained) -> None:
    """Through a miner's own reading: what is spoilt, rare or a bomb."""
    checkout = make_checkout(tmp_path)
    install(trained.bundle, checkout)
    predictor = Predictor.load(trained.bundle, "cpu")
    sent = [(name, data) for name, *_, data in spoilt_metadata()]
    sent += [(name, data) for name, data, _ in rare_modes()]
    whole = {name: predictor(data) for name, data, _ in spoilt_metadata()}
    served_ones = 0
    with running_miner(checkout, MINER_PYTHON) as miner:
        miner.ask(payload(sent[0][1]))
        for name, data in [*sent, *bombs()]:
            try:
                expected = predictor(data)
            except UserError:
                expected = -1.0
            answer = miner.ask(payload(data))
            assert answer.prediction == pytest.approx(expected, abs=TOLERANCE), (name, answer.error)
            # Loose, for a busy machine; `make bench ONLY=payloads` holds 2 s.
            assert answer.seconds < 60, name
            served_ones += expected >= 0
            if name in whole:
                assert expected == whole[name], name
    assert served_ones == len(sent)


def test_an_image_that_is_only_opened_is_read_by_the_detectors_rules(
    tmp_path: Path, trained: Trained
) -> None:
    """Opened from a path, as not by a miner: text behind the pixels is no reason, another format is one."""
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    image.save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    chunk = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 1_500_000))
    (tmp_path / "text.png").write_bytes(in_png(plain, chunk, behind=True))
    image.save(tmp_path / "a.gif")
    checkout = make_checkout(tmp_path / "checkout")
    install(trained.bundle, checkout)
    cases = [(CONFIG, [tmp_path / name]) for name in ("plain.png", "text.png", "a.gif")]
    found = served(checkout, cases)
    assert found[0] == found[1]
    assert found[2] == "UnusableImageError: not an image"


# --------------------------------------------------------------------------- the file itself


def test_pixels_are_read_by_the_same_text() -> None:
    texts = []
    for file in (SOURCE, Path(pixels.__file__)):
        _, begin, rest = file.read_text().partition("# ---- the same in ")
        text, end, _ = rest.partition(": to here\n")
        assert begin
        assert end
        texts.append(text)
    assert texts[0] == texts[1], "copy the marked part of data/pixels.py into the detector"


def test_the_file_needs_nothing_else_and_is_python_3_10() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 10))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif (
            isinstance(node, ast.ImportFrom) and node.level
        ):  # the subnet's package, whatever its name
            imported.add("." * node.level + str(node.module))
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    third_party = imported - set(sys.stdlib_module_names)
    ours = {"torch", "timm", "numpy", "PIL", "safetensors"}
    assert third_party == ours | {"..registry", ".feature_detector"}
    # The subnet's torch has no safetensors in it, and in a pickle there may be code.
    assert "torch.load" not in SOURCE.read_text()


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a trained fusion, which has a file of weights more."""
    case = random_bundle(tmp_path_factory.mktemp("fused"), 5)
    assert case.mode in TRAINED
    return case.bundle


def test_a_changed_or_missing_file_is_not_served(tmp_path: Path, fused: Path) -> None:
    checkout = make_checkout(tmp_path)
    install(fused, checkout)
    weights, configs = checkout / DETECTORS / "weights", checkout / DETECTORS / "configs"
    (whole,) = weights.iterdir()
    names = [
        "model.safetensors", "cvfm_weights.safetensors", "scrc_params.json", "bundle.json",
    ]  # fmt: skip
    assert sorted(path.name for path in whole.iterdir()) == sorted(names)
    for name in names:
        for kind in ("changed", "gone"):
            broken = weights / f"{kind}-{name}"
            shutil.copytree(whole, broken)
            data = bytearray((broken / name).read_bytes())
            last = len(data) - 1  # of tensors; a digit of JSON, which stays JSON
            if name.endswith(".json"):
                last = max(i for i, byte in enumerate(data) if chr(byte) in "0123456789")
            data[last] ^= 1
            (broken / name).write_bytes(data)
            if kind == "gone":
                (broken / name).unlink()
            text = (configs / CONFIG).read_text().replace(whole.name, broken.name)
            (configs / f"{broken.name}.yaml").write_text(text)
    cases: list[tuple[str, list[Path]]] = [(CONFIG, [])]
    cases += [(f"{kind}-{name}.yaml", []) for kind in ("changed", "gone") for name in names]
    intact, *errors = served(checkout, cases)
    assert intact == []
    for name, error in zip(names, errors[: len(names)], strict=True):
        assert f"{name} was changed (SHA-256 differs): run `natix install` again" in error
    for name, error in zip(names, errors[len(names) :], strict=True):
        assert error.startswith("FileNotFoundError")
        assert name in error


SWAPPED = """
import hashlib, pathlib
real = hashlib.sha256
def swapping(data=b""):
    for path in pathlib.Path(sys.argv[1]).rglob("*.other"):
        if path.with_suffix("").exists() and path.with_suffix("").read_bytes() == data:
            path.replace(path.with_suffix(""))
    return real(data)
hashlib.sha256 = swapping
"""


@pytest.mark.parametrize(
    "name", ["model.safetensors", "cvfm_weights.safetensors", "scrc_params.json"]
)
def test_what_was_hashed_is_what_is_served(
    name: str, tmp_path: Path, fused: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = make_checkout(tmp_path)
    install(fused, checkout)
    expected = served(checkout, [(CONFIG, pictures)])
    (path,) = (checkout / DETECTORS / "weights").rglob(name)
    if name.endswith(".json"):
        document = json.loads(path.read_text())
        document["scrc_params"]["served_prior"] = 0.999
        other = json.dumps(document).encode()
    else:
        other = save({key: value + 1 for key, value in load_file(path).items()})
    (path.parent / f"{name}.other").write_bytes(other)
    before, after = PROGRAM.split("sys.path.insert", 1)
    monkeypatch.setitem(globals(), "PROGRAM", f"{before}{SWAPPED}sys.path.insert{after}")
    assert served(checkout, [(CONFIG, pictures)]) == expected
    assert path.read_bytes() == other, "nothing was swapped: the test would hold for any code"
