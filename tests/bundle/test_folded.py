"""Folded models: stock transformers opens them and gives the bundle's probabilities."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from streetvision import cli
from streetvision.bundle import folded, hf_format
from streetvision.bundle.export import export_bundle
from streetvision.bundle.folded import RECORD, describe, fold_bundle, probe_image
from streetvision.bundle.hf_format import plain_vit, vit_state
from streetvision.bundle.predictor import Predictor
from streetvision.core.artifacts import (
    ArtifactSchema,
    read_json,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError
from streetvision.core.params import Cvfm, ViewGrid
from streetvision.data.embeddings import write_embeddings
from streetvision.data.store import open_split
from streetvision.data.transforms import Preprocessing
from streetvision.decision.calibrators import PlattMap
from streetvision.decision.hard_images import HardImages
from streetvision.decision.parametric import BetaMap
from streetvision.decision.pickling import dump_policy_pickle
from streetvision.decision.policy import Policy, policy_from_document, scrc_document
from streetvision.fusion.fusion import Fusion, FusionConfig, save_fusion
from streetvision.models.classifier import ClassifierConfig, load_classifier, save_classifier, score
from streetvision.models.multiview import score_split_views

if TYPE_CHECKING:
    from tests.conftest import Trained

transformers = pytest.importorskip("transformers")

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def vit_config(
    side: tuple[int, int] = (64, 64), fit: Any = "letterbox", **more: Any
) -> ClassifierConfig:
    arguments = SMALL_VIT | {"img_size": list(side)} | more
    preprocessing = Preprocessing(*side, fit, HALF, HALF)
    return ClassifierConfig("vit_tiny_patch16_224.augreg_in21k", arguments, preprocessing)


@pytest.fixture
def make_bundle(trained: Trained, tmp_path: Path) -> Callable[..., Path]:
    """Export a bundle of an untrained classifier, or of the trained one, with some policy and views."""

    def make(
        config: ClassifierConfig | None = None,
        policy: Policy | None = None,
        fusion: FusionConfig | None = None,
    ) -> Path:
        folder = tmp_path / "made"
        shutil.rmtree(folder, ignore_errors=True)
        classifier, document = trained.classifier, read_json(trained.scrc_params, "calibrate")
        if config is not None:
            torch.manual_seed(3)
            model = config.build()
            torch.nn.init.normal_(model.head.weight, std=0.3)
            save_classifier(model, config, folder / "classifier")
            classifier = folder / "classifier"
            images = [config.preprocessing.apply(image.convert("RGB")) for image in challenges()]
            z, _ = score(model.eval(), config.preprocessing, images, 16, torch.device("cpu"))
            slope = float(2 / z.std())
            platt = PlattMap(slope, -slope * float(np.median(z)))
            policy = policy or Policy(platt, 0.7, 0.5, -0.8)
        if policy is not None:
            document = scrc_document(policy, document)
        save_fusion(
            Fusion(fusion or FusionConfig.of("single", Cvfm(), ViewGrid(), 0)), folder / "cvfm"
        )
        write_json_atomic(folder / "scrc_params.json", document)
        write_bytes_atomic(folder / "scrc_params.pkl", dump_policy_pickle(document))
        export_bundle(
            classifier, folder / "scrc_params.json", folder / "scrc_params.pkl", folder / "bundle",
            cvfm=folder / "cvfm", batch_size=16, make_tar=True,
        )  # fmt: skip
        return folder / "bundle"

    return make


def policy_of(trained: Trained, **changes: Any) -> Policy:
    return replace(policy_from_document(read_json(trained.scrc_params, "calibrate")), **changes)


def challenges(n: int = 6, side: int = 224) -> list[Image.Image]:
    """What a miner is sent: JPEGs."""
    images = []
    for seed in range(n):
        data = io.BytesIO()
        probe_image(side, side, 100 + seed).save(data, "JPEG")
        images.append(Image.open(data))
    return images


def served(folder: Path, images: list[Image.Image]) -> list[float]:
    """As the subnet's stock detector: a pipeline of model and processor, and the score by its label."""
    classify = transformers.pipeline(
        "image-classification",
        model=transformers.AutoModelForImageClassification.from_pretrained(folder),
        image_processor=transformers.AutoImageProcessor.from_pretrained(folder, use_fast=True),
    )
    answers = []
    for image in images:
        by_label = {each["label"]: each["score"] for each in classify(image)}
        assert set(by_label) == {"None", "Roadwork"}
        answers.append(by_label["Roadwork"])
    return answers


def assert_serves_the_bundle(bundle: Path, folder: Path, atol: float = 1e-6) -> None:
    predictor, images = Predictor.load(bundle, "cpu"), challenges()
    expected = predictor.probabilities(images)
    assert np.ptp(expected) > 0.1 or atol > 1e-3, "the images do not tell models apart"
    found = np.array(served(folder, images))
    np.testing.assert_allclose(found, expected, atol=atol)
    assert ((found > 0.5) == (expected > 0.5)).all()


def test_a_convolutional_bundle_goes_through_the_timm_wrapper(
    trained: Trained, tmp_path: Path
) -> None:
    record = fold_bundle(trained.bundle, tmp_path / "out/model")
    assert (record["kind"], record["needs_transformers"]) == ("timm_wrapper", "4.53")
    assert record["approximation"] is None
    assert record["checked"]["largest_logit_difference"] < 1e-5
    # Pillow halves an image of seven times the input's side first, but not there: it rounds otherwise.
    assert record["checked"]["challenge_input"]["largest"] < 2
    assert record["other_shapes"] == "the whole on a border, as in the bundle"
    assert all(each["mean"] < 1 for each in record["checked"]["other_inputs"].values())
    folder = tmp_path / "out/model"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", RECORD,
    ]  # fmt: skip
    assert record == read_json(folder / RECORD, "fold")
    assert record["files"] == {
        name: sha256_file(folder / name) for name in ("config.json", "model.safetensors")
    }
    assert_serves_the_bundle(trained.bundle, folder, 0.02)
    assert "upgrade it there" in describe(record)
    assert "the timm there must know resnet18, as 1." in describe(record)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_says_who_may_read_the_folder(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with folded._replacing(tmp_path / "model") as temporary:
            (temporary / RECORD).touch()
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("side", "fit", "atol"),
    [(224, "letterbox", 1e-6), (224, "crop", 1e-6), (64, "crop", 0.02)],
)
def test_a_plain_vit_becomes_transformers_own(
    make_bundle: Callable[..., Path], tmp_path: Path,
    side: int, fit: str, atol: float,
) -> None:  # fmt: skip
    bundle = make_bundle(vit_config((side, side), fit))
    record = fold_bundle(bundle, tmp_path / "model")
    assert (record["kind"], record["needs_transformers"]) == ("vit", "4.45")
    assert record["checked"]["largest_logit_difference"] < 1e-5
    # The same size is not resized; another one is, in other arithmetic than Pillow's.
    assert record["checked"]["challenge_input"]["largest"] <= (1e-4 if side == 224 else 2)
    assert_serves_the_bundle(bundle, tmp_path / "model", atol)
    assert "upgrade" not in describe(record)
    assert record["other_shapes"].startswith("the whole, stretched; the bundle takes the")
    assert record["checked"]["other_inputs"]["640x480"]["mean"] > 3
    # A class-token ViT of 4.45 is asked for `ViTImageProcessorFast`, which is there.
    named = read_json(tmp_path / "model/preprocessor_config.json", "fold")
    assert named["image_processor_type"] == "ViTImageProcessor"


@pytest.mark.parametrize(
    ("side", "fit", "other_shapes"),
    [
        ((64, 96), "letterbox", "the whole on a border, as in the bundle"),
        ((64, 96), "crop", "the middle part, as in the bundle"),
    ],
)
def test_a_vit_that_is_not_square_goes_through_the_wrapper(
    make_bundle: Callable[..., Path], tmp_path: Path,
    side: tuple[int, int], fit: str, other_shapes: str,
) -> None:  # fmt: skip
    bundle = make_bundle(vit_config(side, fit))
    record = fold_bundle(bundle, tmp_path / "model")
    assert record["kind"] == "timm_wrapper"
    assert record["other_shapes"] == other_shapes
    # Pillow halves the challenge first, but not there.
    assert_serves_the_bundle(bundle, tmp_path / "model", 0.02)
    assert record["checked"]["other_inputs"]["640x480"]["mean"] < 1


@pytest.mark.parametrize("bias", [True, False])
def test_layer_scale_is_multiplied_into_the_vit(bias: bool) -> None:
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=(56, 56), qkv_bias=bias, **SMALL_VIT
    ).eval()
    for name, value in backbone.named_parameters():
        if name.endswith(("gamma", "bias")) or "norm" in name:
            torch.nn.init.normal_(value, 0.7, 0.5)
    config = plain_vit(backbone)
    assert config is not None
    same = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{k: v for k, v in config.items() if k != "architectures"})
    ).eval()
    state = vit_state(backbone, config)
    images = torch.rand(2, 3, 56, 56)
    loaded = transformers.ViTForImageClassification.from_pretrained(
        None, config=same.config, state_dict=state
    ).eval()
    with torch.inference_mode():
        wanted = backbone(images)
        found = loaded.vit(images).last_hidden_state[:, 0]
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_tiny_patch16_224", {"pre_norm": True}),
        ("vit_tiny_patch16_224", {"no_embed_class": True}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}),
        ("vit_relpos_small_patch16_224", {}),
        ("xcit_nano_12_p8_224", {"depth": 1}),
        ("resnet18", {}),
    ],
)
def test_a_vit_with_bells_is_not_taken_for_a_plain_one(
    name: str, arguments: dict[str, Any]
) -> None:
    import timm

    arguments = (SMALL_VIT if "vit_tiny" in name else {}) | arguments
    assert plain_vit(timm.create_model(name, num_classes=0, **arguments)) is None


def test_what_no_single_pass_computes_is_refused(
    trained: Trained, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    views = FusionConfig.of("topk_mean", Cvfm(), ViewGrid(grid=2), 0)
    hard = policy_of(trained, hard_images=HardImages(-1.0, 1.0))
    bundle = make_bundle(policy=hard, fusion=views)
    with pytest.raises(UserError) as caught:
        fold_bundle(bundle, tmp_path / "model")
    text = str(caught.value)
    assert "5 views (topk_mean): set cvfm.mode single" in text
    assert "set decision.hard_image_views none" in text
    hidden = replace(vit_config(), head_hidden=8)
    with pytest.raises(UserError, match=r"set train\.head linear"):
        fold_bundle(make_bundle(hidden), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".model*"))


def test_a_bent_policy_is_offered_with_its_cost(
    trained: Trained, tiny_splits: dict[str, Path], make_bundle: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bent = policy_of(trained, calibrator=BetaMap(1.5, 0.6, 0.1), fit_on="clean")
    bundle, output = make_bundle(policy=bent), tmp_path / "model"
    with pytest.raises(UserError, match=r"over 1,001 reference logits .* 0 decisions\. Take it"):
        fold_bundle(bundle, output)
    # In a project whose classifier it is, VAL_CALIB is there.
    project = ArtifactSchema(tmp_path / "project")
    model, config = load_classifier(trained.classifier)
    calib = open_split("embed", "val_calib", tiny_splits["val_calib"])
    one = ViewGrid(grid=1, flip=False)
    scores = score_split_views(model, config.preprocessing, calib, one, 16, torch.device("cpu"))
    write_embeddings(project.embeddings("val_calib"), calib, ("global",), scores)
    weights = {"sha256": sha256_file(trained.classifier / "model.safetensors")}
    write_json_atomic(project.manifest("embed"), {"inputs": [weights]})
    monkeypatch.chdir(project.root)
    assert cli.main(["fold", str(bundle), str(output)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "over 40 logits of VAL_CALIB" in shown.err
    assert "costs 0.0000 of MCC" in shown.err
    assert not output.exists()
    assert cli.main(["fold", str(bundle), str(output), "--approximate"]) == 0
    assert "costs 0.0000 of MCC" in capsys.readouterr().out
    cost = read_json(output / RECORD, "fold")["approximation"]
    assert cost["decisions_changed"] == 0
    assert cost["largest_change"] > 1e-4
    images = challenges(10)
    expected = Predictor.load(bundle, "cpu").probabilities(images)
    found = np.array(served(output, images))
    assert ((found > 0.5) == (expected > 0.5)).all()
    # Another classifier's embeddings say nothing.
    write_json_atomic(project.manifest("embed"), {"inputs": [{"sha256": "0" * 64}]})
    record = fold_bundle(bundle, output, approximate=True, project=project)
    assert record["approximation"]["over"] == "reference logits"
    given = project.embeddings("val_calib")
    record = fold_bundle(bundle, output, approximate=True, embeddings=given)
    assert record["approximation"] == cost


def test_only_an_earlier_fold_is_replaced(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    fold_bundle(trained.bundle / "bundle.tar.gz", output)
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / "preprocessor_config.json").write_text("{}")
    fold_bundle(trained.bundle, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds no folded model"):
        fold_bundle(trained.bundle, other)
    with pytest.raises(UserError, match="holds no folded model"):
        fold_bundle(trained.bundle, other / "thesis.txt")
    assert (other / "thesis.txt").read_text() == "x"


def test_what_transformers_computes_otherwise_is_not_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folded._write

    def damaged(made: Any, folder: Path) -> None:
        name = next(name for name in made.state if name.endswith("fc.bias"))
        real(
            replace(made, state=made.state | {name: made.state[name] + torch.tensor([0, 1e-3])}),
            folder,
        )

    monkeypatch.setattr(folded, "_write", damaged)
    with pytest.raises(UserError, match="computes other log-odds than the bundle"):
        fold_bundle(trained.bundle, tmp_path / "model")

    def stretched(made: Any, folder: Path) -> None:
        config = json.loads(json.dumps(made.config).replace("border", "squash"))
        real(replace(made, config=config), folder)

    monkeypatch.setattr(folded, "_write", stretched)
    with pytest.raises(UserError, match="makes another input of a challenge"):
        fold_bundle(trained.bundle, tmp_path / "model")
    monkeypatch.setattr(folded, "_write", real)
    monkeypatch.setattr(hf_format, "WRAPPER_WITH_ARGUMENTS_NEEDS", "99.1")
    with pytest.raises(UserError, match=r"needs transformers >= 99\.1, \d+\.\S+ is installed"):
        fold_bundle(trained.bundle, tmp_path / "model")
    assert not list(tmp_path.iterdir())
