"""Installing a bundle in a subnet checkout: complete, repeatable, and never over somebody else's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from streetvision import cli
from streetvision.bundle.natix import install as module
from streetvision.bundle.natix.install import CONFIG, DETECTOR, IMPORT, install
from streetvision.bundle.natix.layout import LAYOUTS, Layout, layout_of
from streetvision.bundle.natix.stand_in import make_checkout
from streetvision.bundle.validate import BUNDLE_JSON, sealed
from streetvision.core.artifacts import json_text, read_json, sha256_file
from streetvision.core.errors import UserError

if TYPE_CHECKING:
    from tests.conftest import Trained


DETECTORS = LAYOUTS[0].detectors


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "a checkout")


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def another(bundle: Path, folder: Path) -> Path:
    """The same bundle with another batch size: other content, another hash."""
    shutil.copytree(bundle, folder)
    document = read_json(folder / BUNDLE_JSON, "export") | {"batch_size": 3}
    (folder / BUNDLE_JSON).write_text(json_text(sealed(document)))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_written(layout: Layout, tmp_path: Path, trained: Trained) -> None:
    checkout, detectors = make_checkout(tmp_path, layout), layout.detectors
    before = state(checkout)
    installed = install(trained.bundle, checkout)
    document = read_json(trained.bundle / BUNDLE_JSON, "export")
    name = f"streetvision-{document['sha256'][:12]}"
    assert installed.changed == (
        f"{detectors}/weights/{name}", f"{detectors}/{DETECTOR}", f"{detectors}/configs/{CONFIG}",
        f"{detectors}/__init__.py",
    )  # fmt: skip
    assert installed.miner_env == (
        "IMAGE_DETECTOR=StreetVision", "IMAGE_DETECTOR_CONFIG=StreetVision.yaml",
    )  # fmt: skip
    weights = checkout / detectors / "weights" / name
    assert sorted(path.name for path in weights.iterdir()) == [
        "bundle.json", "model.safetensors", "scrc_params.json",
    ]  # fmt: skip
    for path in weights.iterdir():
        assert sha256_file(path) == sha256_file(trained.bundle / path.name)
    config = yaml.safe_load((checkout / detectors / "configs" / CONFIG).read_text())
    assert config == {
        "hf_repo": "", "config_name": CONFIG, "weights": f"{name}/model.safetensors",
    }  # fmt: skip
    lines = (checkout / detectors / "__init__.py").read_text().splitlines()
    assert lines[-1] == IMPORT
    assert "from .feature_detector import FeatureDetector" in lines[:-1]
    assert not list(checkout.rglob(".*")), "a temporary file stayed"
    after = state(checkout)
    assert {name for name in before if after[name] != before[name]} == {f"{detectors}/__init__.py"}
    assert {name for name in after if not name.startswith(f"{detectors}/")} == {
        f"{layout.folder}/__init__.py", f"{layout.folder}/registry.py",
    }  # fmt: skip


def test_a_second_time_nothing_changes(checkout: Path, trained: Trained) -> None:
    install(trained.bundle, checkout)
    before = state(checkout)
    assert install(trained.bundle, checkout).changed == ()
    assert state(checkout) == before


def test_an_archive_is_as_good(checkout: Path, trained: Trained) -> None:
    archive = trained.bundle / "bundle.tar.gz"
    assert len(install(archive, checkout).changed) == 4
    assert install(trained.bundle, checkout).changed == ()


def test_another_bundle_takes_over_and_the_first_stays(
    checkout: Path, trained: Trained, tmp_path: Path
) -> None:
    first = install(trained.bundle, checkout).changed[0]
    changed = install(another(trained.bundle, tmp_path / "other"), checkout).changed
    assert len(changed) == 2, "the bundle and the YAML"
    assert (checkout / first / "model.safetensors").is_file()
    config = yaml.safe_load((checkout / DETECTORS / "configs" / CONFIG).read_text())
    assert config["weights"] == f"{Path(changed[0]).name}/model.safetensors"
    assert install(trained.bundle, checkout).changed == (f"{DETECTORS}/configs/{CONFIG}",)


def test_a_damaged_copy_is_made_again(checkout: Path, trained: Trained) -> None:
    folder = checkout / install(trained.bundle, checkout).changed[0]
    whole = state(folder)["model.safetensors"][0]
    (folder / "model.safetensors").write_bytes(whole[:-1])
    (folder / "scrc_params.json").unlink()
    assert install(trained.bundle, checkout).changed == (str(folder.relative_to(checkout)),)
    assert state(folder)["model.safetensors"][0] == whole


def test_a_package_file_without_a_last_line_break(checkout: Path, trained: Trained) -> None:
    path = checkout / DETECTORS / "__init__.py"
    path.write_text("from .feature_detector import FeatureDetector")
    install(trained.bundle, checkout)
    assert path.read_text() == f"from .feature_detector import FeatureDetector\n{IMPORT}\n"


def test_a_package_file_of_windows(checkout: Path, trained: Trained) -> None:
    path = checkout / DETECTORS / "__init__.py"
    path.write_bytes(b"# \xe9\r\nfrom .feature_detector import FeatureDetector\r\n")
    before = path.read_bytes()
    install(trained.bundle, checkout)
    assert path.read_bytes() == before + IMPORT.encode() + b"\r\n"
    assert install(trained.bundle, checkout).changed == ()


@pytest.mark.parametrize(
    ("layout", "missing"), [(each, name) for each in LAYOUTS for name in each.needed]
)
def test_a_checkout_that_lacks_something(
    layout: Layout, missing: str, tmp_path: Path, trained: Trained
) -> None:
    checkout = make_checkout(tmp_path, layout)
    path = checkout / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = state(checkout)
    with pytest.raises(UserError, match=f"is no checkout of the subnet: it has no {missing}$"):
        install(trained.bundle, checkout)
    assert state(checkout) == before


def test_a_folder_that_is_no_checkout(tmp_path: Path, trained: Trained) -> None:
    neither = r"it has neither natix/miner \(v0.4 and later\) nor base_miner \(before v0.4\)$"
    with pytest.raises(UserError, match=f"is no checkout of the subnet: {neither}"):
        install(trained.bundle, tmp_path)
    with pytest.raises(UserError, match=r"is no checkout of the subnet: it is no folder$"):
        install(trained.bundle, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is no checkout of the subnet: it is no folder$"):
        install(trained.bundle, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_both_layouts_at_once_are_nobodys(tmp_path: Path, trained: Trained) -> None:
    for layout in LAYOUTS:
        make_checkout(tmp_path, layout)
    before = state(tmp_path)
    with pytest.raises(UserError, match=r"has natix/miner .* and base_miner .*: move away the one"):
        install(trained.bundle, tmp_path)
    assert state(tmp_path) == before


def test_what_an_update_of_the_checkout_leaves_behind_does_not_count(
    tmp_path: Path, trained: Trained
) -> None:
    """Git removes the files of the old layout that it knows, not those that were written into it."""
    new, old = LAYOUTS
    install(trained.bundle, make_checkout(tmp_path, old))
    for name in (
        "__init__.py",
        "registry.py",
        "detectors/__init__.py",
        "detectors/feature_detector.py",
    ):
        (tmp_path / old.folder / name).unlink()
    make_checkout(tmp_path, new)
    assert layout_of(tmp_path) == new
    assert len(install(trained.bundle, tmp_path).changed) == 4


STOCK = "from transformers import pipeline\n"


@pytest.mark.parametrize(
    ("stock", "listed", "needed"),
    [
        (STOCK, "timm>=1\n", ("transformers",)),
        (STOCK, "# transformers\n", ("transformers",)),
        (STOCK, "timm>=1\ntransformers>=4.45\n", ()),
        (STOCK, None, ()),
        ("import timm\n", "timm>=1\n", ()),
    ],
)
def test_what_the_subnets_own_list_lacks_is_said(
    stock: str, listed: str | None, needed: tuple[str, ...], checkout: Path, trained: Trained,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (checkout / DETECTORS / "vit_detector.py").write_text(stock)
    if listed is not None:
        (checkout / "requirements.miner.txt").write_text(listed)
    assert install(trained.bundle, checkout).needed == needed
    assert cli.main(["natix", "install", str(trained.bundle), str(checkout)]) == 0
    said = "no miner starts there without transformers" in capsys.readouterr().out
    assert said == bool(needed)


@pytest.mark.parametrize("name", [DETECTOR, f"configs/{CONFIG}"])
def test_a_foreign_file_is_not_overwritten(name: str, checkout: Path, trained: Trained) -> None:
    (checkout / DETECTORS / name).write_text("# mine\n")
    before = state(checkout)
    with pytest.raises(UserError, match="was not written by this command; move it away first"):
        install(trained.bundle, checkout)
    assert state(checkout) == before


def test_a_changed_bundle_is_refused(checkout: Path, trained: Trained, tmp_path: Path) -> None:
    bundle = another(trained.bundle, tmp_path / "other")
    (bundle / "model.safetensors").write_bytes(b"other")
    before = state(checkout)
    with pytest.raises(UserError, match=r"model\.safetensors was changed after export"):
        install(bundle, checkout)
    assert state(checkout) == before


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_interruption_leaves_the_miner_that_was_there(
    step: int, checkout: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(trained.bundle, checkout)
    config = (checkout / DETECTORS / "configs" / CONFIG).read_bytes()
    calls = 0

    def fail(path: Path, data: bytes) -> Path | None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(module, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        install(another(trained.bundle, tmp_path / "other"), checkout)
    assert (checkout / DETECTORS / "configs" / CONFIG).read_bytes() == config
    weights = checkout / DETECTORS / "weights"
    assert (weights / yaml.safe_load(config)["weights"]).is_file()
    assert not list(weights.glob(".*"))


def test_a_disk_that_cannot_be_written(
    checkout: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    before = state(checkout)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        install(trained.bundle, checkout)
    assert state(checkout) == before


def test_the_command(checkout: Path, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["natix", "install", str(trained.bundle), str(checkout)]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"written into {checkout}:"
    assert f"  {DETECTORS}/{DETECTOR}" in lines
    assert lines[-3:] == [
        "set in its miner.env:", "IMAGE_DETECTOR=StreetVision",
        "IMAGE_DETECTOR_CONFIG=StreetVision.yaml",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert "nothing, all is there" in capsys.readouterr().out
    assert cli.main([*arguments[:3], str(checkout / "nowhere")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("streetvision natix: error: ")
    assert shown.count("\n") == 1
