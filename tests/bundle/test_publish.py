"""`publish`: cards of what was measured, licences first, and one commit on the hub or none."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from streetvision import cli
from streetvision.bundle.folded import RECORD, fold_bundle
from streetvision.bundle.predictor import Predictor
from streetvision.bundle.publish import Submission, check_hotkey, check_repo, publication, upload
from streetvision.bundle.publishable import check_publishable
from streetvision.bundle.validate import BUNDLE_JSON, sealed
from streetvision.core.artifacts import ArtifactSchema, read_json, sha256_file, write_json_atomic
from streetvision.core.errors import UserError
from streetvision.data.store import open_split
from tests.bundle.forging import Payload, forge

if TYPE_CHECKING:
    from tests.conftest import Trained

pytest.importorskip("huggingface_hub")
sys.path.insert(0, str(Path(__file__).parent))
from upload_hub import TOKEN, UploadHub

REPO = "miner/roadwork"
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"  # Alice of substrate's documentation
NAMED = {"backbone_licence": "own", "data_licence": "made here, free of rights"}


def submission(**changes: Any) -> Submission:
    fields: dict[str, Any] = {
        "name": "roadwork", "description": "Finds roadwork.", "version": "1.2.3", "hotkey": HOTKEY,
        "time": 1_790_000_000, **NAMED,
    }  # fmt: skip
    return Submission(**fields | changes)


@pytest.fixture
def project(trained: Trained, repository: Path, tmp_path: Path) -> ArtifactSchema:
    """A project whose metrics (those that Git tracks) are of the trained bundle."""
    paths = ArtifactSchema(tmp_path / "project")
    for name in ("evaluation", "challenge", "data"):
        write_json_atomic(paths.metric(name), read_json(repository / f"metrics/{name}.json", name))
    for step, name in (("evaluate", "evaluation"), ("challenge", "challenge")):
        said = {
            "inputs": [{"sha256": sha256_file(trained.bundle / BUNDLE_JSON)}],
            "outputs": [{"sha256": sha256_file(paths.metric(name))}],
        }
        write_json_atomic(paths.manifest(step), said)
    return paths


def cards(
    trained: Trained, project: ArtifactSchema, folder: Path, given: Submission | None = None,
    folded: Path | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """Every file to publish by its path in the repository."""
    with publication(trained.bundle, given or submission(), project, folder, folded) as files:
        return {name: path.read_bytes() for name, path in files.items()}


# --------------------------------------------------------------------------- cards


def test_the_subnets_card_has_its_fields(
    trained: Trained, project: ArtifactSchema, tmp_path: Path
) -> None:
    files = cards(trained, project, tmp_path / "cards")
    assert json.loads(files["model_card.json"]) == {
        "model_name": "roadwork",
        "description": "Finds roadwork.",
        "version": "1.2.3",
        "submitted_by": HOTKEY,
        "submission_time": 1_790_000_000,
    }
    wanted = {"model_card.json", "README.md", BUNDLE_JSON}
    assert set(files) == wanted | set(read_json(trained.bundle / BUNDLE_JSON, "export")["files"])
    # A repository that is downloaded is a bundle.
    for name, data in files.items():
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / name).write_bytes(data)
    Predictor.load(tmp_path / "again", "cpu")


def test_the_hubs_card_says_results_limits_and_licences(
    trained: Trained, project: ArtifactSchema, tmp_path: Path
) -> None:
    text = cards(trained, project, tmp_path / "cards")["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "image-classification"
    report = read_json(project.metric("evaluation"), "evaluate")
    served, between = report["served"]["mcc"], report["served_interval"]["mcc"]
    assert f"| MCC | {served:.3f} | {between['low']:.3f} – {between['high']:.3f} |" in body
    reward = read_json(project.metric("challenge"), "challenge")["reward"]
    assert f"expected reward per challenge {reward['mean']:.3f} (95 % interval" in body
    assert "generated images or NATIX's own" in body
    assert "synthetic (14,000 images, 8,269 of roadwork)" in body
    assert "48 × 32 pixels" in body
    assert "Backbone resnet18: own (timm records apache-2.0" in body
    assert "Training data (synthetic): made here, free of rights." in body
    assert "/tmp" not in text
    # What was not rendered for this bundle is not borrowed from another one.
    project.manifest("challenge").unlink()
    text = cards(trained, project, tmp_path / "cards")["README.md"].decode()
    assert "nothing is known of its pay" in text
    assert f"{reward['mean']:.3f}" not in text


def test_few_groups_have_no_interval(
    trained: Trained, project: ArtifactSchema, tmp_path: Path
) -> None:
    report = read_json(project.metric("evaluation"), "evaluate")
    write_json_atomic(project.metric("evaluation"), report | {"served_interval": None})
    said = read_json(project.manifest("evaluate"), "evaluate")
    said["outputs"] = [{"sha256": sha256_file(project.metric("evaluation"))}]
    write_json_atomic(project.manifest("evaluate"), said)
    text = cards(trained, project, tmp_path / "cards")["README.md"].decode()
    assert f"| MCC | {report['served']['mcc']:.3f} | – |" in text


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"backbone_licence": " "}, "--backbone-licence (of resnet18; timm records apache-2.0"),
        ({"data_licence": ""}, "--data-licence (of the images of synthetic)"),
    ],
)
def test_nothing_goes_without_licences(
    given: dict[str, str], named: str, trained: Trained, project: ArtifactSchema, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        cards(trained, project, tmp_path / "cards", submission(**given))
    assert not (tmp_path / "cards").exists()


def test_results_must_be_of_this_bundle(
    trained: Trained, project: ArtifactSchema, tmp_path: Path
) -> None:
    report = read_json(project.metric("evaluation"), "evaluate")
    write_json_atomic(project.metric("evaluation"), report | {"mcc": 0.99})
    with pytest.raises(UserError, match=r"not of this bundle.*dvc repro evaluate"):
        cards(trained, project, tmp_path / "cards")
    project.manifest("evaluate").unlink()
    with pytest.raises(UserError, match=r"missing or not of this bundle"):
        cards(trained, project, tmp_path / "cards")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"version": "1.2"}, "not X.Y.Z"),
        ({"version": "01.2.3"}, "not X.Y.Z"),
        ({"name": " "}, "name is empty"),
        ({"hotkey": HOTKEY.replace("w", "x")}, "check sum"),
        ({"hotkey": HOTKEY[:-1]}, "check sum"),
        (
            {"hotkey": "15oF4uVJwmo4TdGW7VfQxNLavjCXviqxT9S1MgbjMNHr6Sp5"},
            "of Bittensor",
        ),  # Polkadot
        ({"hotkey": "0x1234"}, '"0" cannot be in one'),
        ({"hotkey": ""}, "no SS58 address"),
    ],
)
def test_a_submissions_mistakes_are_named(given: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        submission(**given)


def test_addresses_and_repositories_that_are_right() -> None:
    bob = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
    assert check_hotkey(bob) == bob
    assert check_repo(REPO) == REPO
    for wrong in ("roadwork", "a/b/c", "a/", "../b", "a/b c"):
        with pytest.raises(UserError, match="not owner/name"):
            check_repo(wrong)


def test_a_folded_model_becomes_the_root(
    trained: Trained, project: ArtifactSchema, tmp_path: Path
) -> None:
    record = fold_bundle(trained.bundle, tmp_path / "folded")
    files = cards(trained, project, tmp_path / "cards", folded=tmp_path / "folded")
    assert {"config.json", "model.safetensors", RECORD, "bundle/bundle.json"} <= set(files)
    assert files["model.safetensors"] == (tmp_path / "folded/model.safetensors").read_bytes()
    assert "bundle/model.safetensors" in files
    text = files["README.md"].decode()
    assert "stock transformers >= 4.53" in text
    assert record["other_shapes"] in text
    (tmp_path / "folded/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is missing or was changed"):
        cards(trained, project, tmp_path / "cards", folded=tmp_path / "folded")
    write_json_atomic(tmp_path / "folded" / RECORD, record | {"bundle_sha256": "0" * 64})
    with pytest.raises(UserError, match="folded from another bundle"):
        cards(trained, project, tmp_path / "cards", folded=tmp_path / "folded")


# --------------------------------------------------------------------------- what is not published


def refused(bundle: Path, project: ArtifactSchema, folded: Path | None = None) -> str:
    """The one line, of a bundle that loads like any other; nothing is run of what it holds."""
    output = project.root / "cards"
    with (
        pytest.raises(UserError) as caught,
        publication(bundle, submission(), project, output, folded),
    ):
        pass
    assert not output.exists()
    assert "\n" not in str(caught.value)
    assert str(folded or bundle) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def bundle(trained: Trained, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(trained.bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    "name", ["config.json", "modeling_x.py", "model.onnx", "cvfm_weights.pth", "data/1.safetensors"]
)
def test_files_of_other_names_are_not_published(
    name: str, bundle: Path, project: ArtifactSchema
) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"{}")
    forge(bundle, lambda d: d["files"].update({name: sha256_file(bundle / name)}))
    Predictor.load(bundle, "cpu")
    assert f"{name} is none of the files that are published" in refused(bundle, project)


@pytest.mark.parametrize(
    ("old", "new"),
    [("scrc_params.json", "config.json"), ("model.safetensors", "pytorch_model.safetensors")],
)
def test_known_files_under_other_names_are_not_published(
    old: str, new: str, bundle: Path, project: ArtifactSchema
) -> None:
    (bundle / old).rename(bundle / new)
    document = read_json(bundle / BUNDLE_JSON, "export")
    document["files"][new] = document["files"].pop(old)
    if old.endswith(".json"):
        document["policy"]["policy_path"] = new
    else:
        document["model_checkpoint"] = new
    write_json_atomic(bundle / BUNDLE_JSON, sealed(document))
    Predictor.load(bundle, "cpu")
    assert f'is "{new}"; only {old} is published' in refused(bundle, project)


def hostile_policies(folder: Path, mark: Path) -> dict[str, bytes]:
    """Pickles that stock tools would load, by what is wrong with them."""
    data = (folder / "scrc_params.pkl").read_bytes()
    document = read_json(folder / "scrc_params.json", "calibrate")
    moved = json.loads(json.dumps(document))
    moved["scrc_params"]["served_prior"] = 0.9
    return {
        "code": pickle.dumps(Payload(mark)),
        "code within": pickle.dumps({**document, "more": Payload(mark)}),
        "other numbers": pickle.dumps(moved),
        "more behind it": data + pickle.dumps(Payload(mark)),
        "a list": pickle.dumps([document]),
        "damaged": data[:-3],
        "a key more": pickle.dumps(document | {"more": 1}),
        "16 GiB of references": b"\x80\x04}r\xff\xff\xff\x7f.",
    }


def test_a_policy_pickle_is_a_copy_or_not_published(
    bundle: Path, project: ArtifactSchema, tmp_path: Path
) -> None:
    for kind, data in hostile_policies(bundle, tmp_path / "ran").items():
        (bundle / "scrc_params.pkl").write_bytes(data)
        forge(bundle)
        Predictor.load(bundle, "cpu")
        refused(bundle, project)
        assert not (tmp_path / "ran").exists(), kind


def hostile_weights(path: Path, mark: Path) -> dict[str, bytes]:
    """Files of `torch.save` that stock tools would load, by what is wrong with them."""

    def saved(value: object, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    def with_record(name: str, kind: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO(data)
        with zipfile.ZipFile(buffer, "a", kind) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a name that is there
            archive.writestr(name, pickle.dumps(Payload(mark)))
        return buffer.getvalue()

    data = path.read_bytes()
    state = torch.load(path, weights_only=True)
    (folder,) = {name.split("/")[0] for name in zipfile.ZipFile(path).namelist()}
    return {
        "code": pickle.dumps(Payload(mark)),
        "code within": saved({**state, "more": Payload(mark)}),
        "code in the old format": saved(
            {**state, "x": Payload(mark)}, _use_new_zipfile_serialization=False
        ),
        "other numbers": saved({**state, "head.bias": state["head.bias"] + 1}),
        "another type": saved({**state, "head.bias": state["head.bias"].double()}),
        "a parameter": saved({**state, "head.bias": torch.nn.Parameter(state["head.bias"])}),
        "a tensor less": saved(
            {name: value for name, value in state.items() if name != "head.bias"}
        ),
        "a tensor more": saved({**state, "more": torch.zeros(1)}),
        "a nested one": saved({"state_dict": state}),
        "a second pickle": with_record(f"{folder}/data.pkl"),
        "a program": with_record(f"{folder}/code/__torch__.py"),
        "another folder": with_record("other/data.pkl"),
        "packed": with_record(f"{folder}/data/999", zipfile.ZIP_DEFLATED),
        "a pickle in front": pickle.dumps(Payload(mark)) + data,
        "damaged": data[:-30],
    }


@pytest.mark.filterwarnings("ignore")
def test_pickled_weights_are_a_copy_or_not_published(
    bundle: Path, project: ArtifactSchema, tmp_path: Path
) -> None:
    check_publishable(bundle, read_json(bundle / BUNDLE_JSON, "export"))
    for kind, data in hostile_weights(bundle / "model.pth", tmp_path / "ran").items():
        (bundle / "model.pth").write_bytes(data)
        forge(bundle)
        with pytest.raises(
            UserError, match=r"model\.pth holds something else than model\.safetensors"
        ):
            check_publishable(bundle, read_json(bundle / BUNDLE_JSON, "export"))
        assert not (tmp_path / "ran").exists(), kind
    assert "model.pth holds something else" in refused(bundle, project)


def test_a_folded_model_is_what_fold_makes(
    trained: Trained, project: ArtifactSchema, tmp_path: Path
) -> None:
    """Whoever writes the record gives each file its hash."""
    folded = tmp_path / "folded"
    fold_bundle(trained.bundle, folded)
    whole = {path.name: path.read_bytes() for path in folded.iterdir()}

    def forged(change: Callable[[dict[str, Any]], object] = lambda _: None) -> str:
        record = read_json(folded / RECORD, "fold")
        record["files"] = {
            path.name: sha256_file(path) for path in folded.iterdir() if path.name != RECORD
        }
        change(record)
        write_json_atomic(folded / RECORD, record)
        said = refused(trained.bundle, project, folded)
        for path in folded.iterdir():
            path.unlink()
        for name, data in whole.items():
            (folded / name).write_bytes(data)
        return said

    (folded / "modeling_x.py").write_text("import os")
    assert "modeling_x.py is none of the files that `fold` writes" in forged()
    config = json.loads(whole["config.json"])
    config["auto_map"] = {"AutoModelForImageClassification": "modeling_x.Model"}
    write_json_atomic(folded / "config.json", config)
    assert "is not what `fold` makes" in forged()
    write_json_atomic(folded / "preprocessor_config.json", {"auto_map": {}})
    assert "is not what `fold` makes" in forged()
    state = load_file(folded / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, folded / "model.safetensors")
    assert "is not what `fold` makes" in forged()
    for key, value in (
        ("slope", 2.0), ("intercept", 9.0), ("kind", "vit"), ("needs_transformers", "<script>"),
        ("other_shapes", "[x](http://x)"), ("approximation", {"over": "<b>", "n": 1}),
        ("checked", {"transformers": "<b>"}), ("more", "](http://x)"), ("slope", "much"),
        ("files", {"../x": "0"}),
    ):  # fmt: skip
        forged(lambda record, key=key, value=value: record.update({key: value}))  # type: ignore[misc]
    forged(lambda record: record.pop("calibrator"))
    with publication(trained.bundle, submission(), project, tmp_path / "cards", folded) as files:
        assert set(whole) <= set(files)


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_checked_is_what_is_published(
    packed: bool, bundle: Path, project: ArtifactSchema, tmp_path: Path
) -> None:
    whole = {path.name: path.read_bytes() for path in bundle.iterdir()}
    place = bundle / "bundle.tar.gz" if packed else bundle
    with publication(place, submission(), project, tmp_path / "cards") as files:
        for path in bundle.iterdir():
            path.write_bytes(b"changed")
        for name in (BUNDLE_JSON, *read_json(files[BUNDLE_JSON], "export")["files"]):
            assert files[name].read_bytes() == whole[name]


def test_nothing_says_where_or_of_whom_an_image_is(
    trained: Trained, project: ArtifactSchema, tmp_path: Path, tiny_splits: dict[str, Path]
) -> None:
    """Names of images and groups, which may spell a place, stay in the project."""
    split = open_split("export", "val_calib", tiny_splits["val_calib"])
    names = {*map(str, split.groups), *map(str, split.ids)}
    assert len(names) > 40
    for name, data in cards(trained, project, tmp_path / "cards").items():
        assert not any(each.encode() in data for each in names), name


# --------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    from huggingface_hub import constants

    with UploadHub(REPO, "", {".gitattributes": b"lfs"}, exists=False) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "README.md": "---\nlicense: other\n---\n", "bundle.json": "{}", "bundle/big": "xy" * 100,
    }  # fmt: skip
    found = {}
    for name, text in contents.items():
        found[name] = tmp_path / "given" / name
        found[name].parent.mkdir(parents=True, exist_ok=True)
        found[name].write_text(text)
    return found


def content(files: dict[str, Path]) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files.items()}


def test_one_commit_makes_the_repository(hub: UploadHub, files: dict[str, Path]) -> None:
    url = upload(REPO, files, "roadwork 1.0.0", private=True)
    assert url == f"{hub.endpoint}/{REPO}/commit/{hub.head}"
    assert len(hub.commits) == 1
    assert hub.files == {".gitattributes": b"lfs"} | content(files)
    assert hub.created["visibility"] == "private"
    assert len(hub.stored) == 1  # by LFS
    # The next version replaces it: what it no longer has is gone, in the same commit.
    old, new = files["bundle/big"], {n: p for n, p in files.items() if n != "bundle/big"}
    new["bundle/bigger"] = old
    upload(REPO, new, "roadwork 1.0.1")
    assert len(hub.commits) == 2
    assert hub.files == {".gitattributes": b"lfs"} | content(new)


@pytest.mark.parametrize("refuse", ["store", "batch", "commit", "preupload", "create"])
def test_what_breaks_leaves_the_repository_as_it_was(
    refuse: str, hub: UploadHub, files: dict[str, Path]
) -> None:
    hub.refuse = refuse
    with pytest.raises(UserError, match=r"could not be published .*HF_TOKEN may write"):
        upload(REPO, files, "roadwork 1.0.0")
    assert hub.commits == []
    assert hub.files == {".gitattributes": b"lfs"}


def test_somebody_elses_commit_is_not_overwritten(hub: UploadHub, files: dict[str, Path]) -> None:
    hub.exists, hub.race = True, True
    with pytest.raises(UserError, match="could not be published"):
        upload(REPO, files, "roadwork 1.0.0")
    assert hub.files == {".gitattributes": b"lfs"}


def test_a_repository_of_something_else_is_left_alone(
    hub: UploadHub, files: dict[str, Path]
) -> None:
    hub.exists, hub.files = True, {"thesis.pdf": b"x"}
    with pytest.raises(UserError, match=r"holds files and no bundle \(thesis\.pdf"):
        upload(REPO, files, "roadwork 1.0.0")
    assert hub.files == {"thesis.pdf": b"x"}
    assert not any(method in {"POST", "PUT"} for method, _, _ in hub.log)


def test_without_the_extra(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install streetvision\[hub\]"):
        upload(REPO, files, "roadwork 1.0.0")


# --------------------------------------------------------------------------- the command


def test_a_dry_run_asks_the_hub_nothing(
    trained: Trained, project: ArtifactSchema, hub: UploadHub,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(project.root)
    command = ["publish", str(trained.bundle / "bundle.tar.gz"), REPO, "--hotkey", HOTKEY]
    command += ["--model-version", "1.0.0"]
    assert cli.main(command) == 2
    assert "--backbone-licence" in capsys.readouterr().err
    licences = ["--backbone-licence", "own", "--data-licence", "own"]
    assert cli.main([*command, *licences]) == 0
    shown = capsys.readouterr().out
    assert "Nothing was uploaded; the cards are in report/publish" in shown
    assert "model.safetensors" in shown
    assert read_json(Path("report/publish/model_card.json"), "publish")["model_name"] == "roadwork"
    assert hub.log == []


def test_the_command_uploads(
    trained: Trained, project: ArtifactSchema, repository: Path, hub: UploadHub
) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(project.root / "home"), "HF_TOKEN": TOKEN}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [
            sys.executable, "-m", "streetvision", "publish", str(trained.bundle), REPO, "--hotkey", HOTKEY,
            "--model-version", "1.0.0", "--backbone-licence", "own", "--data-licence", "own", "--upload",
        ],
        env=env | {"PYTHONPATH": str(repository)}, cwd=project.root, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{hub.endpoint}/{REPO}/commit/" in done.stdout
    assert len(hub.commits) == 1
    names = set(read_json(trained.bundle / BUNDLE_JSON, "export")["files"])
    assert set(hub.files) == names | {
        ".gitattributes", BUNDLE_JSON, "README.md", "model_card.json",
    }  # fmt: skip
    assert hub.files["model.safetensors"] == (trained.bundle / "model.safetensors").read_bytes()
