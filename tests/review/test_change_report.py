"""`report` as it is typed, on an experiment and on commits of a small project with Git and DVC."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from streetvision.core.artifacts import write_csv_atomic, write_json_atomic
from streetvision.core.params import Params
from streetvision.data.store import open_split
from streetvision.evaluation.evaluate import PICTURE, picture_hash
from streetvision.presets import merge
from streetvision.review.review_plots import overlay_mcc_curves, overlay_roc
from streetvision.stats.metrics import all_metrics, prior_weights
from tests.pipeline.project import Project

Run = Callable[..., tuple[int, str, str]]
PICTURES = {"roc.png", "precision_recall.png", "reliability.png", "mcc_curve.png", "changed.png"}
STAGES = {
    "train": {
        "cmd": "true", "params": ["train.learning_rate"], "metrics": [{"metrics/train.json": {"cache": False}}],
    },
    "evaluate": {
        "cmd": "true",
        "metrics": [{"metrics/evaluation.json": {"cache": False}}],
        "plots": [{"metrics/plots/predictions.csv": {"cache": False}}],
    },
}  # fmt: skip


def write_results(project: Project, noise: float, rate: float) -> None:
    """What a run of the pipeline would leave in Git: better predictions with less noise."""
    split = open_split("evaluate", "val_test", project / "data/splits/val_test.arrow")
    rng = np.random.default_rng(0)
    logits = 2 * (2 * split.labels - 1) + rng.normal(0, noise, len(split))
    p = 1 / (1 + np.exp(-logits))
    pictures = np.array([picture_hash(split.image_bytes(row)) for row in range(len(split))])
    columns = {
        "id": split.ids, "group": split.groups, "label": split.labels, "probability": p, PICTURE: pictures,
    }  # fmt: skip
    write_csv_atomic(
        project / "metrics/plots/predictions.csv", {k: v.tolist() for k, v in columns.items()}
    )
    found = all_metrics(split.labels, p, prior_weights(split.labels, 0.5))
    write_json_atomic(
        project / "metrics/evaluation.json",
        {"mcc": found["mcc"], "interval": {"mcc": {"low": found["mcc"] - 0.1}}},
    )
    trained = {"cost": {"flops_per_step": int(1e9 * rate)}, "parameters": 1234}
    write_json_atomic(project / "metrics/train.json", trained)
    thresholds = np.linspace(0, 1, 11)
    curve = {"threshold": thresholds.tolist(), "mcc": (rate * np.sin(np.pi * thresholds)).tolist()}
    write_csv_atomic(project / "metrics/plots/mcc_curve.csv", curve)
    params = merge(Params().model_dump(mode="json"), {"train": {"learning_rate": rate}})
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    ran = {"cmd": "true", "params": {"params.yaml": {"train.learning_rate": rate}}}
    lock = {"schema": "2.0", "stages": {"train": ran, "evaluate": {"cmd": "true"}}}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))


@pytest.fixture(scope="module")
def made(write_split: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """`main`, and the experiment `wider` with less noise, a higher rate and a run log. Read only."""
    project = Project(tmp_path_factory.mktemp("reported") / "project")
    write_split(project / "data/splits/val_test.arrow", 160, groups=16)
    (project / ".gitignore").write_text("/data/splits/\n/.streetvision/\n/report/\n")
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    write_results(project, 2.5, 0.5)
    project.git("init", "--quiet", "--initial-branch", "main")
    project.dvc("init", "--quiet")
    project.commit()
    write_results(project, 1.5, 0.75)
    commit = project.git("rev-parse", "HEAD").stdout.strip()
    line = {"step": "train", "status": "ok", "seconds": 12.5, "git_commit": commit,
            "started": "2020-01-01T00:00:00+00:00"}  # fmt: skip
    (project / ".streetvision").mkdir()
    (project / ".streetvision/runs.jsonl").write_text(json.dumps(line) + "\n")
    project.dvc("exp", "save", "--name", "wider")
    project.git("checkout", "--quiet", "--", ".")
    return project


@pytest.fixture
def reported(made: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy to change, and the working directory."""
    shutil.copytree(made.root, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return Project(tmp_path / "project")


def rows(text: str) -> dict[str, list[str]]:
    """Cells of all rows of all Markdown tables, by the first."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.slow
def test_an_experiment_against_a_branch(reported: Project, run: Run) -> None:
    (reported / ".streetvision/base.json").write_text('{"torch": {"p95_ms": 20}}')
    (reported / ".streetvision/head.json").write_text('{"torch": {"p95_ms": 21.5}}')
    timing = ("--timing", ".streetvision/base.json", ".streetvision/head.json")
    assert run("report", "main", "wider", *timing) == (0, "report/report.md\n", "")
    text = (reported / "report/report.md").read_text()
    headings = re.findall("^#+ (.*)", text, re.MULTILINE)
    assert headings[:3] == ["What this change does", "Is it real?", "wider against main"]
    assert headings[-7:] == [
        "May it be taken?", "Curves", "Images whose decision changed", "MCC over the threshold, VAL_CALIB",
        "Parameters", "Metrics", "Cost",
    ]  # fmt: skip
    found = rows(text)
    assert found["train.learning_rate"] == ["0.5", "0.75"]
    assert "decision.served_prior" not in found
    drop = found["max_mcc_drop"]
    assert (drop[:2], drop[2][:15]) == (["0.02", "pass"], "MCC difference ")
    assert found["max_ece"][0] == "0.05"
    assert "Off: max_accuracy_drop, min_reward, max_latency_growth." in text
    assert (
        f"wider against main: {'pass' if found['max_ece'][1] == 'pass' else 'inconclusive'}" in text
    )
    mcc = found["metrics/evaluation.json:mcc"]
    assert float(mcc[0]) < float(mcc[1])
    assert mcc[2].startswith("+")
    assert found["MCC"][:2] == mcc[:2]  # of the paired comparison
    assert "<summary>2 more</summary>" in text
    assert "metrics/evaluation.json:interval.mcc.low" in found
    assert found["floating point operations of a training step"] == [
        "500,000,000", "750,000,000", "+250,000,000",
    ]  # fmt: skip
    assert found["parameters"] == ["1,234", "1,234", "+0"]
    assert found["seconds of `train`, on this machine"] == ["–", "12.5000", ""]
    assert found["latency of torch, 95 % quantile, ms"] == ["20", "21.5000", "+1.5000"]
    shown = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert set(shown) == PICTURES == {path.name for path in (reported / "report").glob("*.png")}
    for name in shown:
        with Image.open(reported / "report" / name) as image:
            assert image.format == "PNG"
    with (reported / "report/changed.csv").open(newline="") as file:
        changed = list(csv.DictReader(file))
    assert f"Decisions changed: {len(changed)};" in text
    assert changed
    assert reported.git("status", "--porcelain").stdout == ""


@pytest.mark.slow
def test_commits_in_a_clone_without_the_data(reported: Project, run: Run, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    write_results(reported, 1.5, 0.75)
    reported.commit()
    clone = Project(tmp_path / "clone")
    reported.git("clone", "--quiet", reported.root, clone.root)
    monkeypatch.chdir(clone.root)
    assert run("report", "HEAD~", "--output", "elsewhere")[0] == 0
    text = (clone / "elsewhere/report.md").read_text()
    assert r"### working tree against HEAD\~" in text
    assert "Note: data/splits/val_test.arrow is not here" in text
    assert "Times are not known" in text
    assert rows(text)["train.learning_rate"] == ["0.5", "0.75"]
    assert "Stale" not in text
    drawn = {path.name for path in (clone / "elsewhere").glob("*.png")}
    assert drawn == PICTURES - {"changed.png"}
    assert (clone / "elsewhere/changed.csv").is_file()
    assert not (clone / "report").exists()


@pytest.mark.slow
def test_what_a_revision_lacks_is_said(reported: Project, run: Run) -> None:
    reported.git("rm", "--quiet", "metrics/plots/predictions.csv", "metrics/plots/mcc_curve.csv")
    reported.commit()
    assert run("report", "main~", "main")[0] == 0
    text = (reported / "report/report.md").read_text()
    assert (
        "**Predictions cannot be compared:** metrics/plots/predictions.csv of main is missing"
        in text
    )
    assert "main has no metrics/plots/mcc_curve.csv." in text
    assert "## Parameters\n\nNone differs.\n\n## Metrics\n\nNone differs." in text
    assert {path.name for path in (reported / "report").glob("*.png")} == {"mcc_curve.png"}
    assert not (reported / "report/changed.csv").exists()


@pytest.mark.slow
def test_stale_results_are_named_first_and_not_judged(reported: Project, run: Run) -> None:
    params = yaml.safe_load((reported / "params.yaml").read_text())
    params["train"]["learning_rate"] = 0.9
    (reported / "params.yaml").write_text(yaml.safe_dump(params))
    reported.commit()
    assert run("report", "main~", "main")[0] == 0
    text = (reported / "report/report.md").read_text()
    reason = "train: train.learning_rate was 0.5 and is 0.9"
    assert text.startswith("# What this change does\n\n**Stale in main:** `dvc repro` makes")
    assert f"\n- {reason}\n\n## Is it real?" in text
    assert f"Note: stale in main: {reason}." in text
    assert "## May it be taken?\n\nmain against main\\~: fail, its results are stale." in text
    # As the base they are no measure, and the change may be what mends them.
    write_results(reported, 1.5, 0.9)
    assert run("report", "main")[0] == 0
    text = (reported / "report/report.md").read_text()
    found = rows(text)
    assert found["fresh base"][1] == "inconclusive"
    assert "working tree against main: inconclusive" in text
    assert run("gate", "main")[0] == 1
    assert run("gate", "main", "--inconclusive", "pass")[0] == 0


@pytest.mark.slow
def test_what_cannot_be_judged_is_said(reported: Project, run: Run) -> None:
    write_results(reported, 1.5, 0.75)
    reported.change({"gates": {"min_reward": 0.1}})
    (reported / "metrics/challenge.json").write_text("{}")
    assert run("report", "main")[0] == 0
    said = "May it be taken?\n\nNothing can be judged: metrics/challenge.json of working tree is not what"
    assert said in (reported / "report/report.md").read_text()
    reported.change({"odd": 1})
    assert run("report", "main", "wider")[0] == 0
    assert re.search(
        r"May it be taken\?\n\nNothing is judged: .*params.yaml.*odd",
        (reported / "report/report.md").read_text(),
    )


@pytest.mark.slow
def test_dvcs_page_is_left_out_where_a_revision_names_another_server(
    reported: Project, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ran = subprocess.run, []

    def spying(command: list[str], **rest: Any) -> Any:
        if "dvc" in command:
            ran.append(command[command.index("dvc") :])
            return subprocess.CompletedProcess(command, 0)
        return real(command, **rest)

    monkeypatch.setattr(subprocess, "run", spying)
    assert run("report", "--plots", "--", "main", "wider")[0] == 0
    assert run("report", "--plots", "main")[0] == 0
    start = ["dvc", "plots", "diff", "--out", "report/plots", "--"]
    assert ran == [[*start, "main", "wider"], [*start, "main"]]
    reported.git("checkout", "--quiet", "-b", "theirs")
    (reported / ".dvc/config").write_text(
        "[core]\n    remote = r\n['remote \"r\"']\n    url = http://x\n"
    )
    reported.commit()
    reported.git("checkout", "--quiet", "main")
    code, shown, said = run("report", "--plots", "theirs")
    assert (code, shown) == (0, "report/report.md\n")
    assert (
        "`dvc plots diff` is left out: it reads theirs with that revision's own .dvc/config" in said
    )
    assert len(ran) == 2


@pytest.mark.slow
def test_an_unknown_revision_is_one_line(reported: Project, run: Run) -> None:
    code, shown, said = run("report", "nope")
    assert (code, shown) == (2, "")
    assert said.startswith(
        'streetvision report: error: "nope" is neither a DVC experiment nor a Git'
    )
    assert said.count("\n") == 1
    assert not (reported / "report").exists()


def test_each_side_has_its_own_curve() -> None:
    labels = np.array([0, 1] * 20)
    good, bad = np.where(labels == 1, 0.8, 0.1), np.linspace(0.1, 0.9, 40)
    drawn = [
        overlay_roc(labels, {"base": a, "head": b})
        for a, b in ((good, bad), (good, good), (bad, good))
    ]
    assert len(set(drawn)) == 3
    curve: list[Any] = [np.linspace(0, 1, 5), np.array([0, 0.2, 0.5, 0.3, 0])]
    assert overlay_mcc_curves({"head": curve}) != overlay_mcc_curves({"base": curve, "head": curve})
