"""A copy of this repository that a test may run, break and throw away."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streetvision.core.schema import CONDITIONS, SPLITS
from streetvision.data.store import CONTRACT
from streetvision.presets import load_preset, merge

REPOSITORY = Path(__file__).parents[2]
# In the order in which they run.
STAGES = (
    "check", "ingest", "prepare", "explora", "probe", "train", "embed", "sweep", "cvfm", "calibrate",
    "export", "evaluate", "challenge", "headline",
)  # fmt: skip
# Of `metrics/`, what is DVC's and not Git's: thousands of lines, and a picture of images.
CACHED_METRICS = {"metrics/plots/threshold_sweep.csv", "metrics/plots/mistakes.png"}
# Which embeddings a stage may read: the split contract behind `embed`.
EMBEDDINGS = {
    "sweep": ["val_calib"],
    "cvfm": ["train", "train_served", "val_select", "val_select_served"],
    "calibrate": ["val_calib", "val_calib_served"],
}
# What runs leave beside the results: no part of a fresh project.
_MADE = ("metrics/", "dvc.lock")


@dataclass(frozen=True)
class Project:
    """The project whose root is `root`."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def run(
        self, *command: object, check: bool = True, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the project; with `check`, a failure shows all that it said."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.root, env=environment(self.root) | dict(env or {}), capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{command} → {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def python(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, *arguments, **options)

    def stage(self, name: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one stage as DVC would, without DVC."""
        return self.python("-m", f"stages.{name}", **options)

    def dvc(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "dvc", *arguments, **options)

    def git(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("git", *arguments, **options)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "test")

    def repro(self, *arguments: object) -> list[str]:
        """`dvc repro`; returns the stages that ran or came from DVC's run cache."""
        return stages_run(self.dvc("repro", *arguments).stdout)

    def params(self) -> dict[str, Any]:
        document: dict[str, Any] = yaml.safe_load((self / "params.yaml").read_text())
        return document

    def change(self, changes: Mapping[str, Any]) -> None:
        """Lay nested `changes` over `params.yaml`."""
        document = merge(self.params(), changes)
        (self / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))

    def read_json(self, name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self / name).read_text())
        return document

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """SHA-256 of files, and of all files in folders, by path."""
        found = {}
        for name in names:
            top = self / name
            assert top.exists(), f"{top} does not exist"
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                if path.is_file():
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    found[path.relative_to(self.root).as_posix()] = digest
        return found


def environment(root: Path) -> dict[str, str]:
    """Nothing of the user's configuration; this interpreter's programs first on the path."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("GIT_", "DVC_", "HF_", "PYTEST_", "PYTHON"))
    }
    who = {f"GIT_{role}_{key}": "test@example.org" for role in ("AUTHOR", "COMMITTER")
           for key in ("NAME", "EMAIL")}  # fmt: skip
    return kept | who | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(root.parent / "dvc-site"),
    }  # fmt: skip


def copy_code(folder: Path, preset: str = "smoke") -> Project:
    """What Git would commit, without results, and with a preset's values in `params.yaml`."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if not name.startswith((*_MADE, "tests/")) and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    project = Project(folder)
    project.change(load_preset(preset, REPOSITORY).model_dump(mode="json"))
    return project


def with_git(project: Project) -> Project:
    """Make the project a repository of its own with one commit."""
    project.git("init", "--quiet", "--initial-branch", "main")
    project.commit()
    return project


def stages_run(output: str) -> list[str]:
    """Stages that DVC says it ran or restored, in order, each once.

    But `check`: it runs whenever `params.yaml` is another file.
    """
    pattern = r"^Running stage '(\w+)'|^Stage '(\w+)' is cached"
    found = [first or second for first, second in re.findall(pattern, output, re.MULTILINE)]
    return [name for name in dict.fromkeys(found) if name != "check"]


# --------------------------------------------------------------------------- dvc.yaml


def read_dvc_yaml(root: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((root / "dvc.yaml").read_text())
    return document


def names(entries: Iterable[Any]) -> list[str]:
    """Paths of outs, metrics or plots, each a string or a mapping of the string to its flags."""
    return [next(iter(entry)) if isinstance(entry, Mapping) else str(entry) for entry in entries]


def code_deps(stage: Mapping[str, Any]) -> list[str]:
    return [name for name in stage["deps"] if name.startswith(("stages/", "streetvision/"))]


def data_deps(stage: Mapping[str, Any]) -> list[str]:
    return [name for name in stage["deps"] if name not in code_deps(stage)]


def outputs(stage: Mapping[str, Any]) -> list[str]:
    """Everything a stage writes that DVC knows."""
    return [name for kind in ("outs", "metrics", "plots") for name in names(stage.get(kind, []))]


def contract_violations(document: Mapping[str, Any]) -> list[str]:
    """One line for each stage of `dvc.yaml` that lists other data than the split contract allows."""
    found = []
    for name, stage in document["stages"].items():
        for folder, declared in (
            ("splits", CONTRACT.get(name, {})),
            ("embeddings", EMBEDDINGS.get(name, [])),
        ):
            wanted = {f"data/{folder}/{split}.arrow" for split in declared}
            every = {
                f"data/{folder}/{split}{suffix}.arrow"
                for split in SPLITS
                for suffix in ("", "_originals", *(f"_{condition}" for condition in CONDITIONS))
            }
            listed = every & set(stage["deps"])
            found += [f"{name} lists {path}, not declared" for path in sorted(listed - wanted)]
            found += [f"{name} declares {path}, not listed" for path in sorted(wanted - listed)]
        # A folder as a dep would bring in all splits at once.
        found += [
            f"{name} lists the folder {path}"
            for path in stage["deps"]
            if path.rstrip("/") in {"data", "data/splits", "data/embeddings"}
        ]
    return found


def leaf_items(document: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values of everything that is no mapping or list."""
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield from leaf_items(value, f"{prefix}.{key}")
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from leaf_items(value, f"{prefix}.{number}")
    else:
        yield prefix.lstrip("."), document
