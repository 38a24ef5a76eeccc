"""Revisions read from Git, wherever the repository's top is, and whatever a revision holds."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from streetvision.commands import repro
from streetvision.core import git
from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.artifacts import run_log as logged
from streetvision.core.errors import UserError
from streetvision.core.params import Params
from streetvision.presets import load_preset, merge, preset_changes, value
from streetvision.review.experiments import finished, stage_seconds, working_tree
from streetvision.review.revisions import Revision
from tests.pipeline.project import REPOSITORY, Project

STAGES = {
    "train": {"cmd": "true", "metrics": [{"metrics/train.json": {"cache": False}}]},
    "evaluate": {"cmd": "true", "metrics": [{"metrics/evaluation.json": {"cache": False}}]},
}


def write(project: Project, seed: int = 1, **files: Any) -> None:
    """A project whose results are numbers that one can tell apart."""
    documents: dict[str, Any] = {
        "dvc.yaml": {"stages": STAGES},
        "params.yaml": {"seed": seed},
        "dvc.lock": {"stages": {"train": locked({"seed": seed}), "evaluate": locked({})}},
        "metrics/train.json": {"val_select": {"mcc": 0.1 * seed}},
        "metrics/evaluation.json": {"mcc": 0.01 * seed},
        ".dvc/config": "",
        **files,
    }
    for name, document in documents.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = document if isinstance(document, str) else yaml.safe_dump(document)
        path.write_text(json.dumps(document) if name.endswith(".json") else text)


def locked(params: dict[str, Any], **hashes: Any) -> dict[str, Any]:
    return {"cmd": "true", "params": {"params.yaml": params}, **hashes}


def commit(project: Project, seed: int = 1, **files: Any) -> str:
    write(project, seed, **files)
    project.git("add", "--all", "--force", ".")
    project.git("commit", "--quiet", "--message", str(seed), "--allow-empty")
    return project.git("rev-parse", "HEAD").stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Two commits of a project in the top folder of its repository."""
    found = Project(tmp_path / "project")
    found.root.mkdir()
    found.git("init", "--quiet", "--initial-branch", "main")
    commit(found, 1)
    commit(found, 2)
    return found


def check(root: Path) -> None:
    """HEAD and the commit before, read where the project lies."""
    new, old = finished(root, ["HEAD", "HEAD~"])
    assert (new.params, old.params) == ({"seed": 2}, {"seed": 1})
    assert new.metrics["metrics/evaluation.json:mcc"] == 0.02
    assert old.metrics["metrics/train.json:val_select.mcc"] == 0.1
    assert new.outdated == old.outdated == frozenset()
    assert working_tree(root).params == {"seed": 2}
    for revision in (Revision(root, "HEAD"), Revision(root, None)):
        assert revision.notes() == []
        assert revision.read(root / "metrics/evaluation.json") == '{"mcc": 0.02}'
        assert revision.read(root / "metrics/no.json") is None
    # The run log's commit is HEAD's, and what ran on its parent is found.
    log = ArtifactSchema(root).run_log
    log.unlink(missing_ok=True)
    with logged(log, "train"):
        pass
    assert json.loads(log.read_text())["git_commit"] == new.commit
    line = {"step": "train", "seconds": 3, "git_commit": old.commit, "status": "ok"}
    log.write_text(json.dumps(line | {"started": "2020-01-01T00:00:00+00:00"}) + '\n{"step": "tr')
    assert stage_seconds(root, log, new.commit) == {"train": 3}


def test_in_the_top_folder(project: Project) -> None:
    check(project.root)
    project.git("checkout", "--quiet", "--detach")
    check(project.root)


def test_in_a_sub_folder_with_blanks_and_a_decoy_above(tmp_path: Path) -> None:
    top = Project(tmp_path / "all of it")
    inner = Project(top / "ml models/street vision")
    inner.root.mkdir(parents=True)
    top.git("init", "--quiet")
    for seed in (1, 2):
        write(top, 9)
        commit(inner, seed)
        top.git("add", "--all", "--force")
        top.git("commit", "--quiet", "--amend", "--no-edit")
    check(inner.root)
    assert finished(top.root, ["HEAD"])[0].params == {"seed": 9}
    (inner / "streetvision").mkdir()
    shutil.copytree(top / ".dvc", inner / "streetvision/.dvc")
    with pytest.raises(UserError, match=r"holds no dvc.yaml in this folder; run this in the"):
        finished(inner / "streetvision", ["HEAD"])


def test_in_a_worktree_and_a_submodule(project: Project, tmp_path: Path) -> None:
    project.git("worktree", "add", "--quiet", "--detach", tmp_path / "tree")
    check(tmp_path / "tree")
    outer = Project(tmp_path / "outer")
    outer.root.mkdir()
    outer.git("init", "--quiet")
    given = ("-c", "protocol.file.allow=always", "submodule", "--quiet", "add")
    outer.git(*given, project.root, "inner")
    check(outer / "inner")


def test_a_shallow_clone_says_so(project: Project, tmp_path: Path) -> None:
    project.git("clone", "--quiet", "--depth", "1", f"file://{project.root}", tmp_path / "shallow")
    assert finished(tmp_path / "shallow", ["HEAD"])[0].params == {"seed": 2}
    with pytest.raises(UserError, match="this clone is shallow: `git fetch --unshallow`"):
        finished(tmp_path / "shallow", ["HEAD~"])
    (run,) = finished(tmp_path / "shallow", ["HEAD"])
    log = tmp_path / "shallow/.streetvision/runs.jsonl"
    log.parent.mkdir()
    log.write_text("")
    assert stage_seconds(tmp_path / "shallow", log, run.commit) == {}


def failing_dvc(
    command: list[str], real: Any = subprocess.run, **rest: Any
) -> subprocess.CompletedProcess[Any]:
    """Git runs, DVC says that there is no repository."""
    if "dvc" in command:
        return subprocess.CompletedProcess(command, 251)
    found: subprocess.CompletedProcess[Any] = real(command, **rest)
    return found


def test_without_git(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.rmtree(project / ".git")
    assert working_tree(project.root).params == {"seed": 2}
    with caplog.at_level("WARNING"):
        monkeypatch.setattr(repro.subprocess, "run", failing_dvc)
        assert repro.reproduce(project.root, None) == 251
    assert "git init" in caplog.text
    for revisions in (["HEAD"], []):
        with pytest.raises(UserError, match=r"in no Git repository.*ZIP.*git clone.*git init"):
            finished(project.root, revisions)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="git is not installed"):
        finished(project.root, ["HEAD"])


@pytest.mark.parametrize(
    "revision",
    [
        "HEAD:params.yaml", "--output=x", "-h", "--help", "HEAD~..HEAD", "HEAD..", "^HEAD", "", " ", "\n",
        "HEAD\nmain", "main\x00", "HEAD^{tree}", "HEAD^@", "x;touch y", "$(touch y)", "refs/heads/*",
        "*", "@{9}",
    ],
)  # fmt: skip
def test_no_revision_is_one_line(project: Project, revision: str) -> None:
    for read in (
        lambda: finished(project.root, [revision]),
        lambda: Revision(project.root, revision).run,
    ):
        with pytest.raises(UserError, match="is neither a DVC experiment nor a Git revision"):
            read()
    with pytest.raises(UserError, match="is neither"):
        Revision(project.root, revision).predictions()
    assert {path.name for path in project.root.iterdir()} == {
        ".git", ".dvc", "dvc.yaml", "dvc.lock", "params.yaml", "metrics",
    }  # fmt: skip


@pytest.mark.parametrize("revision", ["HEAD", "@", "main", "HEAD~", "HEAD^{commit}", "HEAD^0"])
def test_what_git_calls_a_commit(project: Project, revision: str) -> None:
    seed = 1 if revision == "HEAD~" else 2
    assert finished(project.root, [revision])[0].params == {"seed": seed}


def test_experiments_are_refs_of_dvc(project: Project) -> None:
    first, head = (project.git("rev-parse", name).stdout.strip() for name in ("HEAD~", "HEAD"))
    for base, name, target in ((head, "new", first), (first, "old", head), (head, "main", first)):
        project.git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/{name}", target)
    project.git("update-ref", "refs/exps/exec/EXEC_BASELINE", head)
    assert git.experiments(project.root) == {"new": first, "main": first}
    # An experiment goes before a branch of its name, and is found from any commit.
    assert [run.params["seed"] for run in finished(project.root, ["main", "old"])] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("dvc.yaml", "stages: [1]", "dvc.yaml of .*: stages must be a mapping"),
        ("dvc.yaml", "stages: {train: 5}", "stages.train must be a mapping"),
        ("dvc.yaml", "stages: {train: {metrics: 5}}", "stages.train.metrics must be a list"),
        ("dvc.yaml", "stages: {train: {metrics: [[1]]}}", "must be paths"),
        ("dvc.yaml", "metrics: {a: 1}", "metrics must be a list"),
        ("dvc.yaml", 'metrics: ["metrics/a.json\\nHEAD:./metrics/evaluation.json"]', "is no path of a file"),
        ("dvc.yaml", "metrics: [../other.json]", "is no path of a file below"),
        ("dvc.yaml", "metrics: [/etc/passwd]", "is no path of a file below"),
        ("dvc.yaml", "metrics: [./metrics/evaluation.json]", "is no path of a file"),
        ("dvc.yaml", 'metrics: ["metrics/train.json:x"]', "no metric file may have a colon"),
        ("dvc.yaml", "metrics: [metrics]", "metrics of .* is no file|cannot read .*metrics"),
        ("dvc.yaml", "a: &a [*a]", "dvc.yaml of .* line 1: .*holds itself"),
        ("dvc.lock", "stages: [1]", "stages must be a mapping"),
        ("dvc.lock", "stages: {train: {outs: 5}}", "outs of train must be a list of files"),
        ("dvc.lock", "stages: {train: {deps: [{path: [1]}]}}", "deps of train must be a list"),
        ("dvc.lock", "stages: {train: {params: [1]}}", "params must be a mapping"),
        ("dvc.lock", "stages: {train: {params: {params.yaml: [1]}}}", "must be a mapping"),
        ("params.yaml", "seed: 1\nseed: 2", 'params.yaml of .* line 2: "seed" is there already'),
        ("params.yaml", "seed: &s [*s]", "holds itself"),
        ("metrics/train.json", '{"a": NaN}', "metrics/train.json of .* NaN is no number"),
        ("metrics/train.json", '{"a": ' + "9" * 5000 + "}", "5,000 characters"),
        ("metrics/train.json", "{", "is not valid JSON"),
    ],
)  # fmt: skip
def test_what_a_branch_holds_is_one_line(
    project: Project, name: str, content: str, said: str
) -> None:
    write(project, 3)
    (project / name).write_text(content)
    for read in (lambda: working_tree(project.root), lambda: finished(project.root, ["HEAD"])):
        with pytest.raises(UserError, match=said) as caught:
            read()
        assert "\n" not in str(caught.value)
        project.git("add", "--all")
        project.git("commit", "--quiet", "--message", "broken", "--allow-empty")


def test_a_line_break_in_a_path_shifts_no_answer(project: Project) -> None:
    """Two requests in one line would give VAL_TEST's numbers the name of TRAIN's."""
    with pytest.raises(UserError, match="is no path"):
        git.files(project.root, [("HEAD", "a.json\nHEAD:./metrics/evaluation.json")])


def test_a_file_beyond_the_bound(project: Project) -> None:
    with pytest.raises(UserError, match=r"params.yaml of HEAD has 8 bytes, more than 7"):
        git.files(project.root, [("HEAD", "params.yaml")], limit=7)
    with pytest.raises(UserError, match="metrics of HEAD is no file"):
        git.files(project.root, [("HEAD", "metrics")])


def test_no_remote_of_a_revision_is_asked(project: Project) -> None:
    """The branch says that its table lies with a server, by its own configuration and by an import."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        table = {"path": "predictions.csv", "md5": "0" * 32, "size": 3}
        outs = [table | {"path": "metrics/plots/predictions.csv"}]
        stages = STAGES | {"evaluate": {"cmd": "true", "outs": ["metrics/plots/predictions.csv"]}}
        commit(project, 4, **{
            ".dvc/config": f"[core]\n    remote = far\n['remote \"far\"']\n    url = {url}\n",
            "dvc.yaml": {"stages": stages},
            "dvc.lock": {"schema": "2.0", "stages": {"evaluate": {"cmd": "true", "outs": outs}}},
            "other.csv.dvc": {
                "outs": [table | {"path": "other.csv"}],
                "deps": [{"path": "x", "repo": {"url": url, "rev_lock": "0" * 40}}],
            },
        })  # fmt: skip
        project.git("checkout", "--quiet", "HEAD~", ".dvc/config")
        for rev in ("HEAD", None):
            with pytest.raises(UserError, match=r"predictions.csv of .* is missing"):
                Revision(project.root, rev).predictions()
            assert Revision(project.root, rev).read(project / "other.csv") is None
            assert Revision(project.root, rev).run.params == {"seed": 4}
        with pytest.raises(TimeoutError):
            server.accept()


def test_json_among_the_plots_has_metrics(project: Project) -> None:
    """`metrics:` are what DVC's tables show; the other metrics stand among a stage's plots."""
    plots = [{"metrics/evaluation.json": {"cache": False}}, "metrics/points.json", "metrics/a.csv"]
    stages = STAGES | {"evaluate": {"cmd": "true", "deps": ["model"], "plots": plots}}
    stages["train"] = {**stages["train"], "outs": ["model"]}
    points = [{"x": 1, "y": 2}]
    lock = {
        "train": locked({"seed": 3}, outs=[{"path": "model", "md5": "new"}]),
        "evaluate": locked({}, deps=[{"path": "model", "md5": "old"}]),
    }
    commit(project, 3, **{
        "dvc.yaml": {"stages": stages}, "dvc.lock": {"stages": lock}, "metrics/points.json": points,
        "metrics/a.csv": "x,y\n1,2\n",
    })  # fmt: skip
    for run in (*finished(project.root, ["HEAD"]), working_tree(project.root)):
        assert run.metrics == {
            "metrics/train.json:val_select.mcc": pytest.approx(0.3),
            "metrics/evaluation.json:mcc": 0.03,
        }
        assert run.outdated == {"metrics/evaluation.json", "metrics/points.json"}


def test_files_that_differ_from_head(project: Project) -> None:
    results = ("dvc.lock", "metrics")
    assert git.changed(project.root, results) == []
    write(project, 3)
    project.git("add", "dvc.lock")  # as DVC does
    (project / "metrics/new.json").write_text("{}")
    names = ["dvc.lock", "metrics/evaluation.json", "metrics/train.json"]
    assert git.changed(project.root, results) == names
    assert git.changed(project.root, ["params.yaml"]) == ["params.yaml"]
    empty = Project(project.root / "empty")
    empty.root.mkdir()
    empty.git("init", "--quiet")
    with pytest.raises(UserError, match="cannot compare"):
        git.changed(empty.root, results)


def test_what_would_have_dvc_ask_elsewhere(project: Project) -> None:
    assert not git.asks_elsewhere(project.root, "HEAD~")
    commit(project, 3, **{".dvc/config": "[core]\n    remote = far\n"})
    assert git.asks_elsewhere(project.root, "HEAD~")
    project.git("checkout", "--quiet", "-b", "import", "HEAD~")
    commit(project, 4, **{"data/x.dvc": {"deps": [{"repo": {"url": "http://x"}}]}})
    project.git("checkout", "--quiet", "-f", "HEAD~")
    assert git.asks_elsewhere(project.root, "import")
    assert git.asks_elsewhere(project.root, "main")
    assert not git.asks_elsewhere(project.root, "import~")


def test_programs_that_a_repository_names_are_not_run(project: Project, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    for key in ("core.fsmonitor", "gpg.program", "core.pager", "core.sshCommand", "core.askPass"):
        project.git("config", key, program)
    project.git("config", "log.showSignature", "true")
    check(project.root)
    assert not (tmp_path / "ran").exists()


def preset_lock(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`dvc.lock` after a run with a preset, and `params.yaml` put back."""
    defaults = Params().model_dump(mode="json")
    given = load_preset(name, REPOSITORY).model_dump(mode="json")
    keys = (
        "seed",
        "data.sources",
        "data.local_root",
        "train.backbone",
        "train.epochs",
        "views.grid",
    )
    params = {key: value(given, key) for key in keys}
    outs = [{"path": "models/x", "md5": "1"}]
    return {
        "stages": {
            "train": locked(params, outs=outs), "evaluate": locked({"seed": 7}, deps=outs),
        }
    }, defaults  # fmt: skip


def test_a_run_with_a_preset_counts_and_is_named(project: Project) -> None:
    lock, defaults = preset_lock("smoke")
    commit(project, 3, **{"dvc.lock": lock, "params.yaml": defaults})
    (run,) = finished(project.root, ["HEAD"])
    assert (run.preset, run.outdated, run.freshness.stale) == ("smoke", frozenset(), frozenset())
    assert run.params["train.epochs"] == preset_changes("smoke")["train"]["epochs"]
    assert run.params["train.epochs"] != defaults["train"]["epochs"]
    revision = Revision(project.root, "HEAD")
    assert revision.notes() == [
        "the results of HEAD are those of the preset smoke, not of its params.yaml"
    ]
    for name in ("photos", "natix-gpu"):
        commit(project, 4, **{"dvc.lock": preset_lock(name)[0], "params.yaml": defaults})
        assert finished(project.root, ["HEAD"])[0].preset == name
    # The path of the photographs is that of the machine it ran on.
    lock, _ = preset_lock("photos")
    lock["stages"]["train"]["params"]["params.yaml"]["data.local_root"] = "/home/somebody/photos"
    commit(project, 4, **{"dvc.lock": lock, "params.yaml": defaults})
    assert finished(project.root, ["HEAD"])[0].preset == "photos"


def test_parameters_that_were_edited_are_no_presets(project: Project) -> None:
    """The results of the defaults are those of the preset `cpu-demo`, whatever `params.yaml` says now."""
    defaults = Params().model_dump(mode="json")
    edited = merge(defaults, {"train": {"learning_rate": 0.5}})
    ran = {"seed": 7, "train.learning_rate": defaults["train"]["learning_rate"]}
    lock = {"stages": {"train": locked(ran), "evaluate": locked({"seed": 7})}}
    for given, stale in (
        (defaults, {}),
        (edited, {"train": "train.learning_rate was 0.003 and is 0.5"}),
    ):
        commit(project, 3, **{"dvc.lock": lock, "params.yaml": given})
        for run in (working_tree(project.root), *finished(project.root, ["HEAD"])):
            assert (run.preset, run.freshness.why) == (None, stale)
    # Nor are those of another preset, once the file has other values than it is shipped with.
    lock, _ = preset_lock("smoke")
    for given in (merge(defaults, {"train": {"epochs": 99}}), merge(defaults, {"seed": 8})):
        commit(project, 4, **{"dvc.lock": lock, "params.yaml": given})
        (run,) = finished(project.root, ["HEAD"])
        assert run.preset is None
        assert run.outdated >= {"metrics/train.json"}


def test_other_parameters_than_a_presets_are_told_from_a_stop(project: Project) -> None:
    lock, defaults = preset_lock("smoke")
    # Each stage by itself would be of the preset but for the seed.
    lock["stages"]["evaluate"]["params"]["params.yaml"]["seed"] = 9
    commit(project, 4, **{"dvc.lock": lock, "params.yaml": defaults})
    (run,) = finished(project.root, ["HEAD"])
    assert run.preset is None
    assert run.freshness.why["evaluate"] == "seed was 9 and is 7"
    # A stop: what `evaluate` read is not what `train` made.
    lock, _ = preset_lock("smoke")
    lock["stages"]["evaluate"]["deps"] = [{"path": "models/x", "md5": "2"}]
    stages = {"stages": STAGES | {"evaluate": STAGES["evaluate"] | {"deps": ["models/x"]}}}
    commit(project, 5, **{"dvc.lock": lock, "params.yaml": defaults, "dvc.yaml": stages})
    (run,) = finished(project.root, ["HEAD"])
    assert run.preset == "smoke"
    assert run.freshness.why == {"evaluate": "it read another models/x than train made"}
    assert run.outdated == {"metrics/evaluation.json"}


def test_a_key_that_has_a_dot(project: Project) -> None:
    commit(project, 3, **{"metrics/train.json": {"a.b": 1, "c": {}}})
    run = finished(project.root, ["HEAD"])[0]
    assert run.metrics["metrics/train.json:a.b"] == 1


def test_the_repository_of_another_user_is_one_line(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run

    def refusing(command: list[str], **rest: Any) -> Any:
        if command[0] == "git":
            text = b"fatal: detected dubious ownership in repository at '/x'\nTo add an exception ...\n"
            return subprocess.CompletedProcess(command, 128, b"", text)
        return real(command, **rest)

    monkeypatch.setattr(subprocess, "run", refusing)
    with pytest.raises(UserError, match=r"Git cannot read .*: fatal: detected dubious ownership"):
        git.check_repository(project.root)
