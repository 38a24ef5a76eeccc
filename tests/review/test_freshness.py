"""Stale stages, with DVC itself as the oracle: what `dvc status` says of the working tree, of commits too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from streetvision.core import git
from streetvision.review.experiments import finished, working_tree
from streetvision.review.freshness import FRESH, MAX_HASHED_BYTES, folder_md5
from tests.pipeline.project import REPOSITORY, Project, with_git

PARAMS = {
    "data": {"root": "data/local", "seed": 1},
    "train": {"rate": 0.5, "layers": [1, {"n": 2}]},
}
STAGES: dict[str, Any] = {
    "ingest": {
        "cmd": "cp data/local/notes.md raw.txt", "deps": ["${data.root}"], "params": ["data.seed"],
        "outs": ["raw.txt"],
    },
    "train": {
        "cmd": "cat code/a.py raw.txt > model.txt && echo 1 > model.json",
        "deps": ["code", "train.py", "raw.txt"], "params": ["train"], "outs": ["model.txt"],
        "metrics": [{"model.json": {"cache": False}}],
    },
    "evaluate": {
        "cmd": "echo 2 > evaluate.json", "deps": ["model.txt", "evaluate.py"],
        "metrics": [{"evaluate.json": {"cache": False}}],
    },
}  # fmt: skip
FILES = {
    "train.py": "1\n", "evaluate.py": "2\r\n", "code/a.py": "3\n", "code/deep/ä b.py": "4\n",
    "code/__pycache__/a.pyc": "x", "data/local/notes.md": "5\n", "other.py": "6\n",
    ".gitignore": "/raw.txt\n/model.txt\n/data/local/*\n!/data/local/notes.md\n__pycache__/\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three stages in a row, reproduced and committed in a sub-folder of a repository. Read only."""
    top = Project(tmp_path_factory.mktemp("fresh") / "top")
    project = Project(top / "ml/project")
    for name, text in FILES.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(text.encode())
    shutil.copy(REPOSITORY / ".dvcignore", project / ".dvcignore")
    write(project, "params.yaml", PARAMS)
    write(project, "dvc.yaml", {"stages": STAGES})
    with_git(top)
    project.dvc("init", "--quiet", "--subdir")
    project.dvc("repro", "--quiet")
    project.commit()
    return top


@pytest.fixture
def project(made: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy to change."""
    shutil.copytree(made.root, tmp_path / "top", symlinks=True)
    yield Project(tmp_path / "top/ml/project")
    shutil.rmtree(tmp_path / "top")


def write(project: Project, name: str, document: Any) -> None:
    (project / name).write_text(yaml.safe_dump(document, sort_keys=False))


def change(project: Project, name: str, edit: Callable[[Any], object]) -> None:
    document = yaml.safe_load((project / name).read_text())
    edit(document)
    write(project, name, document)


def dvc_status(project: Project) -> set[str]:
    with Repo(str(project.root)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()}


def stage(name: str, key: str, item: Any) -> Callable[[Project], object]:
    return lambda project: change(
        project, "dvc.yaml", lambda document: document["stages"][name].update({key: item})
    )


def param(section: str, key: str, item: Any) -> Callable[[Project], object]:
    return lambda project: change(
        project, "params.yaml", lambda document: document[section].update({key: item})
    )


def text(name: str, content: str) -> Callable[[Project], object]:
    return lambda project: (project / name).write_bytes(content.encode())


def gone(name: str) -> Callable[[Project], object]:
    return lambda project: (project / name).unlink()


CHANGES = {
    "nothing": (lambda _: None, {}),
    "a file that no stage reads": (text("other.py", "7\n"), {}),
    "a file that DVC ignores": (text("code/__pycache__/b.pyc", "y"), {}),
    "a parameter": (param("data", "seed", 2), {"ingest": "data.seed was 1 and is 2"}),
    "one of a section": (param("train", "layers", [1, {"n": 3}]), {"train": "train.layers was [1"}),
    "a new one in a section": (
        param("train", "depth", 3), {"train": "train.depth is in dvc.yaml, and it ran without"}
    ),
    "one less in a section": (
        lambda project: change(
            project, "params.yaml", lambda document: document["train"].pop("layers")
        ),
        {"train": "train.layers was "},
    ),
    "a parameter that no stage reads": (param("data", "other", 2), {}),
    "code": (text("train.py", "one\n"), {"train": "train.py changed"}),
    "line ends": (text("evaluate.py", "2\n"), {"evaluate": "evaluate.py changed"}),
    "code that is gone": (gone("evaluate.py"), {"evaluate": "evaluate.py is gone"}),
    "code in a folder": (text("code/deep/ä b.py", "5\n"), {"train": "code changed"}),
    "more code in a folder": (text("code/c.py", ""), {"train": "code changed"}),
    "less code in a folder": (gone("code/a.py"), {"train": "code changed"}),
    "data that Git has": (text("data/local/notes.md", "6\n"), {"ingest": "data/local changed"}),
    "a metric": (text("model.json", "3\n"), {"train": "model.json is not what it wrote"}),
    "a command": (stage("evaluate", "cmd", "true"), {"evaluate": "dvc.yaml has another command"}),
    "another input": (
        stage("evaluate", "deps", ["model.txt", "evaluate.py", "other.py"]),
        {"evaluate": "other.py is in dvc.yaml, and it ran without"},
    ),
    "an input less": (stage("evaluate", "deps", ["model.txt"]), {}),
    "a stage that waits": (
        lambda project: (stage("train", "frozen", True)(project), text("train.py", "x")(project)), {}
    ),
    "a new stage": (
        lambda project: change(
            project, "dvc.yaml",
            lambda document: document["stages"].update(more={"cmd": "true", "deps": ["other.py"]}),
        ),
        {"more": "dvc.lock has no run of it"},
    ),
    "no lock": (gone("dvc.lock"), dict.fromkeys(STAGES, "dvc.lock has no run of it")),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_it_says_what_dvc_says(project: Project, kind: str) -> None:
    """Of the working tree, of a commit with the same content, and of that commit in a clone without data."""
    make, reasons = CHANGES[kind]
    make(project)
    found = working_tree(project.root).freshness
    # DVC itself does not look at what is behind a stage that has not run anew.
    assert set(found.why) == dvc_status(project) == set(reasons)
    for name, reason in reasons.items():
        assert found.why[name].startswith(reason)
    assert found.unknown == ()
    project.commit()
    clone = Project(project.root.parents[2] / "clone/ml/project")
    project.git("clone", "--quiet", project.root.parents[1], clone.root.parents[1])
    for root in (project.root, clone.root):
        (run,) = finished(root, ["HEAD"])
        assert (run.name, run.freshness) == ("HEAD", found)
    assert not (clone / "raw.txt").exists()
    assert working_tree(clone.root).freshness == found
    shutil.rmtree(clone.root.parents[1])


def test_stages_behind_a_stale_one_are_stale(project: Project) -> None:
    param("data", "seed", 2)(project)
    run = working_tree(project.root)
    assert run.freshness.behind == ("train", "evaluate")
    assert run.freshness.stale == set(STAGES)
    assert run.outdated == {"model.json", "evaluate.json"}
    assert run.freshness.lines() == [
        "ingest: data.seed was 1 and is 2", "train, evaluate: behind the above"
    ]  # fmt: skip
    # What was run in part: what the next stage read is not what is there now.
    project.dvc("repro", "--quiet", "--single-item", "--force", "ingest")
    text("data/local/notes.md", "other\n")(project)
    project.dvc("repro", "--quiet", "--single-item", "ingest")
    project.commit()
    (run,) = finished(project.root, ["HEAD"])
    assert run.freshness.why == {"train": "it read another raw.txt than ingest made"}
    assert run.freshness.behind == ("evaluate",)


def test_several_reasons_and_stages_with_one(project: Project) -> None:
    shared = {
        name: {**STAGES[name], "deps": [*STAGES[name]["deps"], "other.py"]} for name in STAGES
    }
    write(project, "dvc.yaml", {"stages": shared})
    project.dvc("repro", "--quiet")
    text("other.py", "x")(project)
    (line,) = working_tree(project.root).freshness.lines()
    assert line == "ingest, train, evaluate: other.py changed"
    for name in ("train.py", "code/a.py"):
        text(name, "x")(project)
    param("train", "rate", 1)(project)
    assert (
        working_tree(project.root)
        .freshness.why["train"]
        .endswith("; code changed; other.py changed; 1 more")
    )


def test_data_that_git_has_not_are_not_known_in_a_commit(project: Project, tmp_path: Path) -> None:
    photo = project / "data/local/photo.jpg"
    photo.write_bytes(b"1")
    (project / "data/local/more.jpg").write_bytes(b"1")
    project.dvc("repro", "--quiet")
    project.commit()
    (run,) = finished(project.root, ["HEAD"])
    assert (run.freshness.why, run.freshness.unknown) == ({}, ("data/local",))
    assert working_tree(project.root).freshness == FRESH
    clone = tmp_path / "clone"
    project.git("clone", "--quiet", project.root.parents[1], clone)
    assert working_tree(clone / "ml/project").freshness.unknown == ("data/local",)
    # DVC cannot tell data that are elsewhere from data that were deleted.
    assert dvc_status(Project(clone / "ml/project")) >= {"ingest"}
    # Here they are, so that a change is seen: of content, of number.
    for edit in (
        lambda: photo.write_bytes(b"2"),
        photo.unlink,
        lambda: (project / "data/local/two.jpg").write_bytes(b"1"),
    ):
        edit()
        assert working_tree(project.root).freshness.why == {"ingest": "data/local changed"}
        assert dvc_status(project) == {"ingest"}


def test_data_outside_the_project(project: Project, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    (photos / "a/1.jpg").write_bytes(b"1")
    param("data", "root", str(photos))(project)
    project.dvc("repro", "--quiet")
    project.commit()
    assert working_tree(project.root).freshness.lines() == []
    assert finished(project.root, ["HEAD"])[0].freshness.unknown == (str(photos),)
    (photos / "a/2.jpg").write_bytes(b"1")
    assert working_tree(project.root).freshness.why == {"ingest": f"{photos} changed"}
    shutil.rmtree(photos)
    assert working_tree(project.root).freshness.unknown == (str(photos),)


@pytest.mark.parametrize(
    "place", ["./data/local", "data//local/", "code/../data/local", "{root}/data/local"]
)
def test_a_path_may_be_written_in_many_ways(project: Project, tmp_path: Path, place: str) -> None:
    param("data", "root", place.format(root=project.root))(project)
    project.dvc("repro", "--quiet")
    project.commit()
    clone = tmp_path / "clone"
    project.git("clone", "--quiet", project.root.parents[1], clone)
    for run in (working_tree(project.root), working_tree(clone / "ml/project")):
        assert run.freshness == FRESH
    text("data/local/notes.md", "6\n")(project)
    assert dvc_status(project) == {"ingest"}
    project.commit()
    for run in (working_tree(project.root), *finished(project.root, ["HEAD"])):
        assert run.freshness.why == {"ingest": "data/local changed"}


def test_data_that_dvc_added(project: Project, tmp_path: Path) -> None:
    """They are not in Git, but their hash is."""
    (project / "photos").mkdir()
    (project / "photos/1.jpg").write_bytes(b"1")
    param("data", "root", "photos")(project)
    project.dvc("add", "--quiet", "photos")
    project.dvc("repro", "--quiet")
    project.commit()
    clone = tmp_path / "clone"
    project.git("clone", "--quiet", project.root.parents[1], clone)
    for run in (*finished(project.root, ["HEAD"]), working_tree(clone / "ml/project")):
        assert (run.freshness.lines(), run.freshness.unknown) == ([], ())
    (project / "photos/1.jpg").unlink()
    (project / "photos/1.jpg").write_bytes(b"2")
    project.dvc("add", "--quiet", "photos")
    project.commit()
    assert finished(project.root, ["HEAD"])[0].freshness.why == {"ingest": "photos changed"}


def test_a_large_folder_is_told_by_number_and_size(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streetvision.review.freshness.MAX_HASHED_BYTES", 1)
    assert MAX_HASHED_BYTES >= 2**30
    text("data/local/notes.md", "6\n")(project)
    assert working_tree(project.root).freshness.lines() == []
    text("data/local/notes.md", "66\n")(project)
    assert working_tree(project.root).freshness.why == {"ingest": "data/local changed"}


def test_files_of_several_commits_are_read_once(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = finished(project.root, ["HEAD"])
    asked: list[bytes] = []
    real = git._batch

    def batch(root: Path, mode: str, request: bytes) -> bytes:
        if mode == "--batch":
            asked.append(request)
        return real(root, mode, request)

    text("train.py", "new\n")(project)
    project.commit()
    monkeypatch.setattr(git, "_batch", batch)
    (run,) = finished(project.root, ["HEAD"])
    assert run.freshness.why == {"train": "train.py changed"}
    name = project.git("rev-parse", "HEAD:./train.py").stdout
    # dvc.yaml; parameters, lock and metrics; the code that no commit had before.
    assert len(asked) == 3
    assert asked[-1].decode() == name


def test_the_hash_of_a_folder_is_dvcs(project: Project) -> None:
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    (code,) = [dep for dep in lock["stages"]["train"]["deps"] if dep["path"] == "code"]
    commit = project.git("rev-parse", "HEAD").stdout.strip()
    assert folder_md5(git.md5_below(project.root, commit, "code")) == code["md5"]
    assert code["nfiles"] == 2


def test_a_variable_that_is_no_parameter_hides_nothing(project: Project) -> None:
    stages = STAGES | {"evaluate": STAGES["evaluate"] | {"deps": ["model.txt", "${code}"]}}
    write(project, "dvc.yaml", {"vars": [{"code": "evaluate.py"}], "stages": stages})
    assert dvc_status(project) == set()
    assert working_tree(project.root).freshness == FRESH
    text("evaluate.py", "other\n")(project)
    assert dvc_status(project) == {"evaluate"}
    assert working_tree(project.root).freshness.why == {"evaluate": "evaluate.py changed"}


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "https://x/y", "s3://x/y", "/dev/zero"]
)
def test_paths_of_a_lock_that_lead_elsewhere_are_not_read(project: Project, path: str) -> None:
    stage("evaluate", "deps", ["model.txt", "evaluate.py", path])(project)
    change(
        project, "dvc.lock",
        lambda document: document["stages"]["evaluate"]["deps"].append({"path": path, "md5": "1"}),
    )  # fmt: skip
    project.commit()
    (run,) = finished(project.root, ["HEAD"])
    assert (run.freshness.why, run.freshness.unknown) == ({}, (path,))
