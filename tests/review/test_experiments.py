"""DVC experiments and commits read as runs, in a repository whose stages only copy numbers."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from streetvision import cli
from streetvision.core.errors import UserError
from streetvision.review.experiments import finished, stage_seconds
from streetvision.review.revisions import Revision
from tests.pipeline.project import Project, with_git

PARAMS = {"data": {"split_seed": 7}, "seed": 1, "train": {"rate": 0.5}}
# VAL_SELECT's MCC depends on rate and seed, VAL_TEST's on VAL_SELECT's.
TRAIN = """
import json, yaml
from pathlib import Path
given = yaml.safe_load(Path("params.yaml").read_text())
value = given["train"]["rate"] + 0.01 * given["seed"]
Path("model.txt").write_text(str(value))
Path("metrics").mkdir(exist_ok=True)
Path("metrics/train.json").write_text(json.dumps({"val_select": {"mcc": value}}))
"""
EVALUATE = """
import json
from pathlib import Path
value = float(Path("model.txt").read_text())
Path("metrics/evaluation.json").write_text(json.dumps({"mcc": value - 0.1}))
"""


def write_pipeline(project: Project) -> Project:
    """Two stages, `train` and `evaluate`, in a Git repository with DVC, reproduced and committed."""
    project.root.mkdir(parents=True)
    for name, text in (("train.py", TRAIN), ("evaluate.py", EVALUATE)):
        (project / name).write_text(text)
    (project / ".gitignore").write_text("/model.txt\n/report/\n")
    (project / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    stages = {
        "train": {
            "cmd": "python train.py", "deps": ["train.py"], "params": ["data.split_seed", "seed", "train.rate"],
            "outs": ["model.txt"], "metrics": [{"metrics/train.json": {"cache": False}}],
        },
        "evaluate": {
            "cmd": "python evaluate.py", "deps": ["evaluate.py", "model.txt"],
            "metrics": [{"metrics/evaluation.json": {"cache": False}}],
        },
    }  # fmt: skip
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    project.git("init", "--quiet", "--initial-branch", "main")
    project.dvc("init", "--quiet")
    project.dvc("repro", "--quiet")
    return with_git(project)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Two rates by two seeds, up to `train`; and `whole`, run to the end. Read only."""
    project = write_pipeline(Project(tmp_path_factory.mktemp("swept") / "project"))
    for name, rate, seed in (("a1", 0.6, 1), ("a2", 0.6, 2), ("b1", 0.7, 1), ("b2", 0.7, 2)):
        given = ("-S", f"train.rate={rate}", "-S", f"seed={seed}")
        project.dvc("exp", "run", "--quiet", "--name", name, *given, "train")
    project.dvc("exp", "run", "--quiet", "--name", "whole", "-S", "train.rate=0.8", "-S", "seed=1")
    project.git("checkout", "--quiet", ".")
    return project


@pytest.mark.slow
def test_experiments_as_runs(swept: Project) -> None:
    runs = {run.name: run for run in finished(swept.root)}
    assert len(runs) == 5
    assert all(len(run.commit) == 40 for run in runs.values())
    whole = runs.pop("whole")
    assert whole.params == {"data.split_seed": 7, "seed": 1, "train.rate": 0.8}
    assert whole.metrics["metrics/train.json:val_select.mcc"] == pytest.approx(0.81)
    assert whole.metrics["metrics/evaluation.json:mcc"] == pytest.approx(0.71)
    assert whole.outdated == frozenset()
    for name in (None, "main", "whole"):
        assert Revision(swept.root, name).notes() == []
    # Those that stopped after `train` still carry HEAD's evaluation.
    for run in runs.values():
        assert run.outdated == {"metrics/evaluation.json"}
        assert run.freshness.why == {"evaluate": "it read another model.txt than train made"}
        note = f"stale in {run.name}: evaluate: it read another model.txt than train made"
        assert Revision(swept.root, run.name).notes()[0] == note
        assert run.metrics["metrics/evaluation.json:mcc"] == pytest.approx(0.41)
        rate, seed = run.params["train.rate"], run.params["seed"]
        assert run.metrics["metrics/train.json:val_select.mcc"] == pytest.approx(rate + 0.01 * seed)


@pytest.mark.slow
def test_named_revisions(swept: Project) -> None:
    head = swept.git("rev-parse", "HEAD").stdout.strip()
    runs = finished(swept.root, ["main", "whole", head[:9]])
    assert [run.name for run in runs] == ["main", "whole", head[:9]]
    assert runs[0].commit == runs[2].commit == head
    assert runs[0].params["train.rate"] == 0.5
    with pytest.raises(UserError, match='"nope" is neither a DVC experiment nor a Git revision'):
        finished(swept.root, ["main", "nope"])


def test_outside_a_project(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no DVC project"):
        finished(tmp_path)


@pytest.mark.slow
def test_sweep_summary_from_its_command_line(
    swept: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(swept.root)
    assert cli.main(["sweep-summary", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("the highest is best: 3 configurations, 5 runs over seed")
    assert lines[3].split()[:4] == ["0.8", "1", "0.8100", "whole"]
    assert lines[4].split() == ["0.7", "2", "0.7150", "±", "0.0071", "b1", "b2"]
    assert lines[-1] == "VAL_TEST of the best, metrics/evaluation.json:mcc: 0.7100"
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["train.rate"] for row in rows] == ["0.8", "0.7", "0.7", "0.6", "0.6"]
    assert [row["experiment"] for row in rows] == ["whole", "b1", "b2", "a1", "a2"]
    # Some experiments only, by name, also as JSON and Markdown.
    names, files = ["a1", "a2", "b1", "b2"], [tmp_path / "sweep.json", tmp_path / "sweep.md"]
    written = ["--json", str(files[0]), "--md", str(files[1])]
    assert cli.main(["sweep-summary", *names, *written]) == 0
    found: dict[str, Any] = json.loads(files[0].read_text())
    assert "| 0.7 | 2 | 0.7150 ± 0.0071 | b1 b2 |" in files[1].read_text().splitlines()
    assert found["paired"]
    assert found["noise"] == pytest.approx(0, abs=1e-9)  # the seed moves both rates alike
    assert found["corrected"] == pytest.approx(0.715)
    assert found["reported"] is None
    assert swept.git("status", "--porcelain").stdout == ""


@pytest.mark.slow
def test_sweep_summary_names_a_mistake(
    swept: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(swept.root)
    assert cli.main(["sweep-summary", "--metric", "metrics/evaluation.json:mcc"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "measured on VAL_TEST, which may choose nothing" in shown.err
    assert not (swept / "report").exists()


@pytest.mark.slow
def test_sweep_summary_names_runs_that_failed(
    swept: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    project = Project(tmp_path / "project")
    shutil.copytree(swept.root, project.root, symlinks=True)
    project.dvc("exp", "run", "--queue", "--name", "broken", "-S", "train.rate=none")
    project.dvc("exp", "run", "--queue", "--name", "whole2", "-S", "train.rate=0.3")
    project.dvc("exp", "run", "--run-all", check=False)
    monkeypatch.chdir(project.root)
    assert cli.main(["sweep-summary"]) == 0
    shown = capsys.readouterr()
    assert "whole2" in shown.out
    assert "broken" not in shown.out
    assert (
        "an experiment failed and is left out: broken; to see why: dvc queue logs NAME" in shown.err
    )
    assert cli.main(["sweep-summary", "a1", "b1"]) == 0
    assert "failed" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_commit_whose_results_are_not_its_own_is_no_run(
    swept: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its code was changed, and it did not run."""
    project = Project(tmp_path / "clone")
    swept.git("clone", "--quiet", swept.root, project.root)
    (project / "train.py").write_text(f"{TRAIN}# a change\n")
    project.commit()
    monkeypatch.chdir(project.root)
    assert cli.main(["sweep-summary", "HEAD"]) == 2
    said = capsys.readouterr().err
    assert "writes metrics/train.json; stale in HEAD: train: train.py changed\n" in said


def test_seconds_of_the_stages_that_a_commit_ran(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.root.mkdir()
    log = project / ".streetvision/runs.jsonl"

    def commit(**stages: int) -> str:
        lock = {"stages": {name: {"cmd": value} for name, value in stages.items()}}
        (project / "dvc.lock").write_text(yaml.safe_dump(lock))
        (project / ".gitignore").write_text("/.streetvision/\n")
        if not (project / ".git").exists():
            project.git("init", "--quiet")
        project.commit()
        return project.git("rev-parse", "HEAD").stdout.strip()

    def entry(commit: str, step: str, seconds: float, started: str, status: str = "ok") -> str:
        line = {"git_commit": commit, "step": step, "seconds": seconds, "status": status}
        return json.dumps(line | {"started": f"{started}T00:00:00+00:00"}) + "\n"

    first = commit(train=1, evaluate=1)
    second = commit(train=2, evaluate=1)
    assert stage_seconds(project.root, log, second) == {}
    log.parent.mkdir()
    log.write_text(
        entry(first, "train", 5, "2020-01-01")
        + entry(first, "train", 6, "2020-01-02")
        + entry(first, "train", 1, "2020-01-03", "failed")
        + entry(first, "train", 99, "2999-01-01")  # of a later experiment on the same commit
        + entry(first, "evaluate", 7, "2020-01-02")  # whose result did not change
        + entry(second, "evaluate", 8, "2020-01-04")
    )
    assert stage_seconds(project.root, log, first) == {}  # has no parent
    assert stage_seconds(project.root, log, second) == {"train": 6}
    # The results are still those of the second commit, here and after one that changes something else.
    assert stage_seconds(project.root, log, None) == {"train": 6}
    project.git("commit", "--quiet", "--allow-empty", "--message", "words")
    (project / "words.md").write_text("words")
    project.commit()
    third = project.git("rev-parse", "HEAD").stdout.strip()
    assert stage_seconds(project.root, log, third) == {"train": 6}
    assert stage_seconds(project.root, log, None) == {"train": 6}
    # Before its commit a result is in the working tree, and of a run on HEAD.
    log.write_text(log.read_text() + entry(third, "evaluate", 9, "2020-01-05"))
    lock = {"stages": {"train": {"cmd": 2}, "evaluate": {"cmd": 2}}}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert stage_seconds(project.root, log, None) == {"train": 6, "evaluate": 9}
    assert stage_seconds(project.root, log, third) == {"train": 6}
    fourth = commit(train=2, evaluate=2)
    assert stage_seconds(project.root, log, fourth) == {"train": 6, "evaluate": 9}
    # Amended, it is another commit of the same parent; a broken lock of the past hides nothing behind it.
    project.git("commit", "--quiet", "--amend", "--allow-empty", "--message", "other words")
    assert stage_seconds(project.root, log, None) == {"train": 6, "evaluate": 9}
    (project / "dvc.lock").write_text("<<<<<<< HEAD\n")
    project.commit()
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    project.commit()
    assert stage_seconds(project.root, log, None)["train"] == 6
