"""The bundle: complete, sealed, portable, and the same answers after the trip."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from safetensors.torch import load_file, save_file

from streetvision.bundle.export import export_bundle
from streetvision.bundle.predictor import Predictor
from streetvision.bundle.validate import (
    BUNDLE_JSON,
    SCHEMA,
    BundleValidator,
    read_bundle,
    sealed,
)
from streetvision.core.artifacts import json_text, read_json, sha256_file
from streetvision.core.errors import UserError
from streetvision.data.store import open_split
from streetvision.decision.calibrators import PlattMap
from streetvision.decision.pickling import dump_policy_pickle
from streetvision.decision.policy import Policy, policy_from_document
from streetvision.models.classifier import load_classifier, score_split

if TYPE_CHECKING:
    from tests.conftest import Trained

FILES = ["bundle.json", "model.pth", "model.safetensors", "scrc_params.json", "scrc_params.pkl"]


@pytest.fixture
def bundle(tmp_path: Path, trained: Trained) -> Path:
    """A copy that a test may break."""
    shutil.copytree(trained.bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def images(tiny_splits: dict[str, Path]) -> list[Image]:
    split = open_split("evaluate", "val_test", tiny_splits["val_test"])
    return [split.image(row) for row in range(len(split))]


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Predictor.load(folder, "cpu")
    with pytest.raises(UserError) as same:
        BundleValidator().validate(folder)
    assert str(caught.value) == str(same.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `bundle.json` as somebody would who knows how it is sealed."""
    document = json.loads((folder / BUNDLE_JSON).read_text())
    change(document)
    (folder / BUNDLE_JSON).write_text(json_text(sealed(document)))


# --------------------------------------------------------------------------- round trip


def test_the_bundle_gives_the_answers_of_its_parts(
    trained: Trained, images: list[Image], tiny_splits: dict[str, Path]
) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    model, config = load_classifier(trained.classifier)
    split = open_split("evaluate", "val_test", tiny_splits["val_test"])
    logits, _ = score_split(model, config.preprocessing, split, 16, torch.device("cpu"))
    policy = policy_from_document(read_json(trained.scrc_params, "calibrate"))
    np.testing.assert_array_equal(predictor.logits(images), logits.astype(np.float64))
    probabilities = predictor.probabilities(images)
    np.testing.assert_array_equal(probabilities, policy.deployed_probability(logits))
    assert predictor(images[3]) == pytest.approx(probabilities[3], abs=1e-6)
    assert probabilities.std() > 0.01, "nothing was learnt: the test would hold for any order"
    assert len(predictor.probabilities([])) == 0


def test_the_folder_moves(bundle: Path, images: list[Image]) -> None:
    before = Predictor.load(bundle, "cpu").probabilities(images)
    moved = bundle.rename(bundle.parent / "else where")
    np.testing.assert_array_equal(Predictor.load(str(moved), "cpu").probabilities(images), before)
    assert str(bundle.parent) not in (moved / BUNDLE_JSON).read_text()


def test_single_and_batched_logits_agree(trained: Trained, images: list[Image]) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    batched = predictor.logits(images)
    single = np.concatenate([predictor.logits([image]) for image in images])
    assert np.abs(single - batched).max() <= 1e-5
    decide = predictor.policy.decide
    np.testing.assert_array_equal(decide(single), decide(batched))


def test_images_are_read_one_batch_at_a_time(trained: Trained, images: list[Image]) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    read = 0
    scored_after: list[int] = []
    real = predictor.model.forward

    def forward(inputs: torch.Tensor) -> Any:
        scored_after.append(read)
        return real(inputs)

    def stream() -> Any:
        nonlocal read
        for image in images:
            read += 1
            yield image

    predictor.model.forward = forward  # type: ignore[method-assign]
    predictor.logits(stream())
    assert scored_after == [16, 32, 40]


def test_half_is_negative(trained: Trained, images: list[Image]) -> None:
    predictor = Predictor.load(trained.bundle, "cpu")
    with torch.no_grad():
        predictor.model.head.weight.zero_()
        predictor.model.head.bias.zero_()
    predictor.policy = Policy(PlattMap(1.0, 0.0), 0.5, 0.5)
    probabilities = predictor.probabilities(images[:3])
    assert (probabilities == 0.5).all()
    assert not predictor.policy.decide(np.zeros(3)).any()
    assert predictor.policy.decide(np.full(3, 1e-9)).all()
    # What a validator computes from the answer.
    assert np.round(probabilities).tolist() == [0, 0, 0]


# --------------------------------------------------------------------------- content


def test_the_content_of_the_bundle(trained: Trained) -> None:
    document = json.loads((trained.bundle / BUNDLE_JSON).read_text())
    names = {path.name for path in trained.bundle.iterdir()}
    assert names == {*FILES, "bundle.tar.gz"}
    assert document["policy_type"] == document["policy"]["policy_type"] == "scrc"
    assert document["policy"]["policy_path"] == "scrc_params.json"
    assert document["model_checkpoint"] == "model.safetensors"
    assert document["cvfm_weights"] is None
    assert document["class_names"] == ["None", "Roadwork"]
    assert document["batch_size"] == 16
    assert document["files"] == {
        name: sha256_file(trained.bundle / name) for name in FILES if name != BUNDLE_JSON
    }
    model, _ = load_classifier(trained.classifier)
    assert document["parameters"] == sum(p.numel() for p in model.parameters())
    state = torch.load(trained.bundle / "model.pth", weights_only=True)
    weights = load_file(trained.bundle / "model.safetensors")
    assert set(state) == set(weights)
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    policy = read_json(trained.scrc_params, "calibrate")
    assert (trained.bundle / "scrc_params.pkl").read_bytes() == dump_policy_pickle(policy)


def export(trained: Trained, output: Path, *, make_tar: bool = True) -> dict[str, Any]:
    return export_bundle(
        trained.classifier, trained.scrc_params, trained.scrc_pickle, output,
        cvfm=trained.cvfm, batch_size=16, make_tar=make_tar,
    )  # fmt: skip


def test_two_exports_are_equal_to_the_byte(trained: Trained, tmp_path: Path) -> None:
    reports = [export(trained, tmp_path / name) for name in ("one", "another/two")]
    assert reports[0] == reports[1]
    for name in [*FILES, "bundle.tar.gz"]:
        one, two = (tmp_path / folder / name for folder in ("one", "another/two"))
        assert one.read_bytes() == two.read_bytes(), name
        assert hashlib.sha256(one.read_bytes()).hexdigest() == sha256_file(trained.bundle / name)
    assert reports[0]["files"] == len(FILES)
    assert reports[0]["bytes"] == sum((tmp_path / "one" / n).stat().st_size for n in FILES)


def test_the_tar_is_the_bundle(trained: Trained, tmp_path: Path, images: list[Image]) -> None:
    with tarfile.open(trained.bundle / "bundle.tar.gz") as tar:
        members = tar.getmembers()
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert [member.name for member in members] == FILES
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    found = Predictor.load(tmp_path / "unpacked", "cpu").logits(images)
    np.testing.assert_array_equal(found, Predictor.load(trained.bundle, "cpu").logits(images))


def test_no_tar_unless_asked(trained: Trained, tmp_path: Path) -> None:
    export(trained, tmp_path / "bundle", make_tar=False)
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == FILES


def test_an_export_without_its_parts_lists_them_all(trained: Trained, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    with pytest.raises(UserError) as caught:
        export_bundle(
            missing, missing / "scrc_params.json", trained.scrc_pickle, tmp_path / "bundle",
            cvfm=missing / "cvfm", batch_size=16, make_tar=False,
        )  # fmt: skip
    message = str(caught.value)
    for name in ("model.safetensors (stage `train`)", "config.json (stage `train`)"):
        assert name in message
    assert "config.json (stage `cvfm`)" in message
    assert "scrc_params.json (stage `calibrate`)" in message
    assert "scrc_params.pkl" not in message
    assert not (tmp_path / "bundle").exists()


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_changed_byte_is_refused(name: str, where: float, bundle: Path) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (bundle / name).write_bytes(data)
    message = refusal(bundle)
    assert name in message


def test_any_changed_byte_of_bundle_json_is_refused(bundle: Path) -> None:
    data = (bundle / BUNDLE_JSON).read_bytes()
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1
        (bundle / BUNDLE_JSON).write_bytes(changed)
        with pytest.raises(UserError, match=r"bundle\.json"):
            read_bundle(bundle)
    (bundle / BUNDLE_JSON).write_bytes(data)
    read_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_shortened_file_is_refused(name: str, bundle: Path) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    assert name in refusal(bundle)
    (bundle / name).unlink()
    assert name in refusal(bundle)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    assert "bundle.json is missing; the stage `export` makes it" in refusal(tmp_path)
    assert "bundle.json is missing" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "path",
    ["../outside.json", "/etc/passwd", "a/../../b", "..\\outside", "sub/../scrc_params.json"],
)
@pytest.mark.parametrize("key", ["policy_path", "model_checkpoint", "files"])
def test_a_path_that_leaves_the_bundle_is_refused(key: str, path: str, bundle: Path) -> None:
    (bundle.parent / "outside.json").write_text("{}")
    if key == "policy_path" and not path.endswith(".json"):
        path += ".json"
    elif key == "model_checkpoint":
        path += ".safetensors"

    def change(document: dict[str, Any]) -> None:
        if key == "files":
            document["files"][path] = hashlib.sha256(b"{}").hexdigest()
        elif key == "policy_path":
            document["policy"][key] = path
        else:
            document[key] = path

    forge(bundle, change)
    assert f'path "{path}" must stay inside the bundle' in refusal(bundle)


def test_a_file_without_a_hash_is_refused(bundle: Path) -> None:
    forge(bundle, lambda document: document["files"].pop("model.safetensors"))
    assert '"model.safetensors" has no SHA-256' in refusal(bundle)


def test_the_content_behind_a_link_counts(bundle: Path) -> None:
    real = (bundle / "scrc_params.json").rename(bundle.parent / "elsewhere.json")
    (bundle / "scrc_params.json").symlink_to(real)
    read_bundle(bundle)
    real.write_bytes(real.read_bytes() + b" ")
    assert "scrc_params.json was changed" in refusal(bundle)


@pytest.mark.parametrize("key", json.loads(SCHEMA.read_text())["required"])
def test_a_missing_key_is_named(key: str, bundle: Path) -> None:
    if key == "sha256":  # without a seal the rest is not believed
        document = json.loads((bundle / BUNDLE_JSON).read_text())
        del document[key]
        (bundle / BUNDLE_JSON).write_text(json_text(document))
        assert "bundle.json was changed after export" in refusal(bundle)
        return
    forge(bundle, lambda document: document.pop(key))
    assert f"the document lacks {key}" in refusal(bundle)


@pytest.mark.parametrize("inner", [True, False])
def test_another_policy_is_refused(inner: bool, bundle: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        (document["policy"] if inner else document)["policy_type"] = "ensemble"

    forge(bundle, change)
    assert "policy_type is 'ensemble'; it must be scrc" in refusal(bundle)


def resign(folder: Path, name: str) -> None:
    """Give a changed file its new hash, as a broken export would."""
    forge(folder, lambda d: d["files"].update({name: sha256_file(folder / name)}))


def test_weights_that_are_no_numbers_are_refused(bundle: Path) -> None:
    state = load_file(bundle / "model.safetensors")
    state["backbone.bn1.weight"][0] = float("nan")
    save_file(state, bundle / "model.safetensors")
    resign(bundle, "model.safetensors")
    assert "not finite, in backbone.bn1.weight" in refusal(bundle)


def test_a_policy_with_another_threshold_is_refused(bundle: Path) -> None:
    document = json.loads((bundle / "scrc_params.json").read_text())
    document["scrc_params"]["decision_threshold"] = 0.4
    (bundle / "scrc_params.json").write_text(json_text(document))
    resign(bundle, "scrc_params.json")
    assert "decision_threshold is 0.4" in refusal(bundle)


def test_export_refuses_weights_that_are_no_numbers(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.classifier, tmp_path / "classifier")
    weights = tmp_path / "classifier/model.safetensors"
    state: dict[str, torch.Tensor] = load_file(weights)
    state["head.bias"][0] = float("inf")
    save_file(state, weights)
    with pytest.raises(UserError, match=r"not finite, in head.bias"):
        export_bundle(
            tmp_path / "classifier", trained.scrc_params, trained.scrc_pickle, tmp_path / "bundle",
            cvfm=trained.cvfm, batch_size=16, make_tar=False,
        )  # fmt: skip


def test_the_package_offers_its_classes() -> None:
    import streetvision.bundle as package

    assert package.Predictor is Predictor
    assert package.BundleValidator is BundleValidator
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing  # type: ignore[attr-defined]
