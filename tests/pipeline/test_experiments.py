"""DVC's experiments, queue and diffs, as the README tells people to use them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from streetvision.core.params import Params
from streetvision.evaluation.headline import HEADLINE
from streetvision.presets import load_preset
from tests.pipeline.project import CACHED_METRICS, REPOSITORY, STAGES, Project, stages_run

EXPERIMENTS = (REPOSITORY / "docs/experiments.md").read_text()


@pytest.mark.slow
def test_a_sweep_with_seeds_from_queue_to_branch(project: Project) -> None:
    """The recipes of docs/experiments.md, in their order."""
    grid = ("-S", "train.learning_rate=0.001,0.01", "-S", "seed=7,8", "-S", "train.epochs=1")
    queued = project.dvc("exp", "run", "--queue", *grid, "train").stdout
    assert queued.count("Queued experiment") == 4
    assert project.git("status", "--porcelain").stdout == ""
    project.dvc("exp", "run", "--run-all", "--jobs", "2")
    # Each in a copy of the project: nothing here has changed.
    assert project.git("status", "--porcelain").stdout == ""
    shown = json.loads(project.dvc("exp", "show", "--json").stdout)
    runs = [run for entry in shown for group in entry["experiments"] or [] for run in group["revs"]]
    losses = {
        (params["train"]["learning_rate"], params["seed"]):
        run["data"]["metrics"]["metrics/train.json"]["data"]["val_select"]["loss"]
        for run in runs
        for params in [run["data"]["params"]["params.yaml"]["data"]]
    }  # fmt: skip
    assert set(losses) == {(rate, seed) for rate in (0.001, 0.01) for seed in (7, 8)}
    assert len(set(losses.values())) == 4
    metrics = [list(run["data"]["metrics"]) for run in runs]
    assert metrics == [["metrics/headline.json", "metrics/train.json"]] * 4
    columns = ("--drop", ".*", "--keep", "^seed$|^train.learning_rate$|^val_select.loss$")
    header = project.dvc("exp", "show", "--md", *columns).stdout.partition("\n")[0]
    assert set(header.split()) == {"|", "val_select.loss", "seed", "train.learning_rate"}
    summary = project / "report/sweep.json"
    project.python(
        "-m", "streetvision", "sweep-summary", "--metric", "val_select.loss", "--json", summary
    )  # fmt: skip
    found = project.read_json("report/sweep.json")
    mean = {rate: (losses[rate, 7] + losses[rate, 8]) / 2 for rate in (0.001, 0.01)}
    best = found["configurations"][0]
    assert best["score"]["mean"] == pytest.approx(min(mean.values()))
    assert best["params"]["train.learning_rate"] == min(mean, key=lambda rate: mean[rate])
    assert found["paired"]
    assert found["corrected"] > best["score"]["mean"]
    # VAL_TEST was not read: what lies there is HEAD's. It is, once the best is here and run to its end.
    assert found["reported"] is None
    name = best["experiments"][0]
    project.dvc("exp", "apply", name)
    assert project.params()["train"]["learning_rate"] == best["params"]["train.learning_rate"]
    assert project.repro() == list(STAGES[STAGES.index("embed") :])
    project.dvc("exp", "branch", name, "better")
    assert "params.yaml" in project.git("diff", "--name-only", "main", "better").stdout
    remote = project.root.parent / "remote"
    project.git("init", "--quiet", "--bare", remote)
    project.git("remote", "add", "origin", remote)
    project.dvc("exp", "push", "--no-cache", "origin", name)
    assert name in project.dvc("exp", "list", "origin").stdout


@pytest.mark.slow
def test_a_decision_reruns_nothing_before_it(project: Project) -> None:
    done = project.dvc("exp", "run", "-S", "decision.calibrator=beta")
    assert stages_run(done.stdout) == [
        "calibrate", "export", "evaluate", "challenge", "headline"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_retraining_with_another_seed_in_tables_and_comparisons(project: Project) -> None:
    """One-line forms of docs/experiments.md; scenes of another seed are no test set of both."""
    done = project.dvc("exp", "run", "-S", "train.learning_rate=0.01", "-S", "seed=8")
    assert {"train", "headline"} <= set(stages_run(done.stdout))
    # At most: without `--all`, what did not change is left out.
    rows = project.dvc("metrics", "diff", "--all", "--md").stdout.strip().splitlines()[2:]
    assert 10 < len(rows) <= 40
    names = [[cell.strip() for cell in row.strip("|").split("|")][:2] for row in rows]
    assert [name for file, name in names if file == "metrics/headline.json"] == sorted(HEADLINE)
    assert {file for file, _ in names} == {"metrics/headline.json", "metrics/train.json"}
    [command] = re.findall(r"^dvc (exp show --no-pager .*)$", EXPERIMENTS, re.MULTILINE)
    shown = project.dvc(*shlex.split(command), env={"COLUMNS": "160"}).stdout.splitlines()
    assert max(map(len, shown)) <= 160
    header = next(line for line in shown if "Experiment" in line).split()
    assert header[:4] == ["Experiment", "mcc", "mcc_low", "mcc_high"]
    assert {"ece", "val_select_mcc", "train.learning_rate", "seed"} <= set(header)
    # Ids in common, and no picture.
    for command in ("compare", "gate"):
        done = project.python("-m", "streetvision", command, "main", check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "the test sets differ: of " in done.stderr
        assert " images they share 0, " in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_registry_versions_promotes_and_fetches_the_bundle(project: Project) -> None:
    project.run("gto", "register", "roadwork-detector", "--version", "v1.0.0")
    project.run("gto", "assign", "roadwork-detector", "--version", "v1.0.0", "--stage", "prod")
    tags = project.git("tag").stdout.split()
    assert tags == ["roadwork-detector#prod#1", "roadwork-detector@v1.0.0"]
    other = Project(project.root.parent / "elsewhere")
    other.root.mkdir()
    other.dvc(
        "artifacts", "get", project.root, "roadwork-detector", "--stage", "prod", "--out", "bundle"
    )
    found, wanted = other.hashes(["bundle"]), project.hashes(["models/bundle"])
    assert {name.removeprefix("models/"): sha for name, sha in wanted.items()} == found


@pytest.mark.slow
def test_diffs_work_in_a_clone_without_the_data(project: Project, tmp_path: Path) -> None:
    first = project.git("rev-parse", "HEAD").stdout.strip()
    project.change({"sweep": {"n_thresholds": 50}, "decision": {"served_prior": 0.4}})
    assert {"sweep", "calibrate"} <= set(project.repro("calibrate"))
    project.commit()
    clone = Project(tmp_path / "clone")
    project.git("clone", "--quiet", project.root, clone.root)
    assert not (clone / "data/raw").exists()
    assert not (clone / ".dvc/cache").exists()
    metrics = json.loads(clone.dvc("metrics", "diff", "--json", first, "HEAD").stdout)
    assert metrics == {}, "no stage behind `calibrate` ran, and what it measures is no row of DVC's"
    changed = clone.git("diff", "--numstat", first, "HEAD", "--", "metrics").stdout.splitlines()
    lines = {line.split()[2]: int(line.split()[0]) for line in changed if line[0] != "-"}
    assert "metrics/calibrate.json" in lines
    assert lines["metrics/plots/mcc_curve.csv"] <= 101
    assert not CACHED_METRICS & set(lines)
    params = json.loads(clone.dvc("params", "diff", "--json", first, "HEAD").stdout)
    count = params["params.yaml"]["sweep.n_thresholds"]
    assert (count["old"], count["new"]) == (5000, 50)
    drawn = json.loads(clone.dvc("plots", "diff", first, "HEAD", "--json").stdout)["data"]
    curve = next(name for name in drawn if name.endswith("mcc_curve.csv"))
    assert "training loss" in drawn
    assert any(name.endswith("predictions.csv") for name in drawn)
    assert drawn[curve][0]["revisions"] == [first, "HEAD"]
    done = clone.dvc("plots", "diff", first, "HEAD", "--out", "page")
    assert "failed" not in done.stderr
    pictures = sorted(path.name for path in (clone / "page/static").glob("*confusion.png"))
    assert len(pictures) == 2
    page = (clone / "page/index.html").read_text()
    assert all(name in page for name in pictures)


@pytest.mark.slow
def test_preset_as_overrides_in_a_shell(project: Project) -> None:
    """From the defaults, in a temporary copy; everything comes from the cache of the same parameters."""
    project.change(Params().model_dump(mode="json"))
    project.git("commit", "--quiet", "--all", "--message", "the defaults")
    before = (project / "params.yaml").read_bytes()
    command = 'eval "dvc exp run --temp --name smoke $(python -m streetvision preset smoke)"'
    done = project.run("bash", "-c", command)
    ran = re.findall("Running stage '(.*)'", done.stdout)
    assert ran == ["check"], "a parameter arrived changed"
    assert (project / "params.yaml").read_bytes() == before
    assert project.git("status", "--porcelain").stdout == ""
    found = project.git(
        "for-each-ref", "--format", "%(refname)", "refs/exps/**/smoke"
    ).stdout.strip()
    wanted = load_preset("smoke", REPOSITORY).model_dump(mode="json")
    assert yaml.safe_load(project.git("show", f"{found}:params.yaml").stdout) == wanted
    name = "metrics/evaluation.json"
    assert (
        project.git("show", f"{found}:{name}").stdout == project.git("show", f"HEAD~:{name}").stdout
    )
