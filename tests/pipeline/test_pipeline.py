"""The pipeline as a black box, reproduced on the smoke preset."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from streetvision.core.artifacts import ArtifactSchema, config_hash, json_text
from streetvision.core.params import leaves
from streetvision.core.schema import SPLIT_SCHEMA, SPLITS
from streetvision.data.embeddings import read_embeddings
from streetvision.evaluation.headline import HEADLINE
from streetvision.plots import curves
from streetvision.presets import value
from streetvision.subnet.profiles import HALT
from tests.pipeline.project import (
    STAGES,
    Project,
    data_deps,
    leaf_items,
    names,
    outputs,
    read_dvc_yaml,
    with_git,
)

# Runs every stage with a `Params` that has lost all that `dvc.yaml` does not track for it.
BLIND = """
from importlib import import_module
from pathlib import Path
import yaml
from pydantic import BaseModel
from stages.common import Stage
from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.params import load_params

def blind(section, prefix, tracked):
    for key, value in list(section.__dict__.items()):
        if prefix + key == "hardware" or prefix + key in tracked:
            continue
        if isinstance(value, BaseModel):
            blind(value, f"{prefix}{key}.", tracked)
        else:
            del section.__dict__[key]

root = Path.cwd()
stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
for name in sorted(stages, key="headline".__eq__):
    params = load_params(root / "params.yaml")
    blind(params, "", stages[name].get("params", []))
    getattr(import_module(f"stages.{name}"), name)(Stage(name, params, ArtifactSchema(root)))
"""
OUT_FOLDERS = ("data/raw", "data/splits", "data/embeddings", "models", "metrics")


def every_output(project: Project) -> list[str]:
    return [name for s in read_dvc_yaml(project.root)["stages"].values() for name in outputs(s)]


def json_files(project: Project) -> list[Path]:
    return [
        path for top in ("data", "metrics", "models") for path in (project / top).rglob("*.json")
    ]


def rows(project: Project, name: str) -> list[dict[str, str]]:
    with (project / name).open(newline="") as file:
        return list(csv.DictReader(file))


def read_split(project: Project, name: str) -> pa.Table:
    with pa.OSFile(str(project / f"data/splits/{name}.arrow")) as source:
        return pa.ipc.open_file(source).read_all()


# --------------------------------------------------------------------------- what is there


def test_all_outputs_and_nothing_else(reproduced: Project) -> None:
    listed = every_output(reproduced)
    for name in listed:
        assert (reproduced / name).exists(), name
    found = {
        path.relative_to(reproduced.root).as_posix()
        for top in OUT_FOLDERS
        for path in (reproduced / top).rglob("*")
        if path.is_file() and path.name != ".gitignore"
    }
    stray = {n for n in found if not any(n == out or n.startswith(f"{out}/") for out in listed)}
    assert not stray, "DVC does not know these"
    assert list(ArtifactSchema(reproduced.root).scratch.glob("*/*/")) == []
    # Git has the metrics and none of the data.
    tracked = set(reproduced.git("ls-files").stdout.split())
    stages = read_dvc_yaml(reproduced.root)["stages"].values()
    for stage in stages:
        assert not tracked & set(names(stage.get("outs", [])))
        assert set(names(stage.get("metrics", []))) <= tracked
        assert set(names(stage.get("plots", []))) <= tracked


def test_json_is_sorted_finite_and_free_of_circumstances(reproduced: Project) -> None:
    files = json_files(reproduced)
    assert len(files) >= 14
    folder, host = str(reproduced.root), re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    for path in files:
        text = path.read_text()
        document = json.loads(text)
        in_order = path.name == "headline.json"  # that of DVC's tables
        assert text == json_text(document, sort_keys=not in_order), (
            f"{path} is not in canonical form"
        )
        for key, leaf in leaf_items(document):
            if isinstance(leaf, float):
                assert math.isfinite(leaf), (path, key)
            if not isinstance(leaf, str):
                continue
            assert folder not in leaf, (path, key)
            assert not leaf.startswith(("/", "~")), (path, key)
            assert not host.search(leaf), (path, key)
            if leaf != HALT:  # a fact with its day
                assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d", leaf), (path, key)
        words = {word for key, _ in leaf_items(document) for word in re.split(r"[._]", key)}
        assert not words & {"seconds", "duration", "latency", "started", "host", "hostname", "date"}


def test_metrics_have_scalar_leaves(reproduced: Project) -> None:
    files = [p for p in (reproduced / "metrics").glob("*.json") if "manifest" not in p.name]
    assert {p.stem for p in files} == {
        "data",
        "explora",
        "probe",
        "train",
        "sweep",
        "cvfm",
        "calibrate",
        "export",
        "evaluation",
        "challenge",
        "headline",
    }

    def containers(document: object) -> Iterator[object]:
        yield document
        if isinstance(document, dict):
            for item in document.values():
                yield from containers(item)

    for path in files:
        document = json.loads(path.read_text())
        # DVC ignores lists; null is no number to compare.
        wrong = [x for x in containers(document) if not isinstance(x, dict | int | float | str)]
        assert not wrong, path
    evaluation = reproduced.read_json("metrics/evaluation.json")
    assert -1 <= evaluation["mcc"] <= 1
    assert 0 <= evaluation["ece"] <= 1
    challenge = reproduced.read_json("metrics/challenge.json")
    assert -1 <= challenge["mcc"] <= 1
    headline = reproduced.read_json("metrics/headline.json")
    assert list(headline) == list(HEADLINE)
    assert headline["mcc"] == evaluation["mcc"]
    assert headline["ece"] == evaluation["ece"]
    assert headline["challenge_mcc"] == challenge["mcc"]
    assert 0 <= challenge["reward"]["mean"] <= 1
    assert "generated images or NATIX's own" in challenge["unmeasured"]
    assert challenge["status"].startswith("Since 2026-05-06 (commit 05b830e)")
    # The configured validator leads; two of the three have four levels.
    assert challenge["validator"] == reproduced.params()["subnet"]["validator"] == "crop"
    assert set(challenge["validators"]) == {"crop", "letterbox", "raw"}
    assert challenge["mcc"] == challenge["validators"]["crop"]["mcc"]
    assert challenge["challenges_scored"] == 9 * challenge["n"] == 9 * evaluation["n"]
    assert challenge["skew"]["mcc_stored"] == pytest.approx(evaluation["mcc"])
    fusion = reproduced.read_json("metrics/cvfm.json")
    assert fusion["fit_on"] == "served"
    single = fusion["modes"]["single"]
    assert single["clean"]["log_loss"] != single["served"]["log_loss"]


# --------------------------------------------------------------------------- files that others know


def test_thresholds_schema(reproduced: Project) -> None:
    document = reproduced.read_json("models/policy/thresholds.json")
    fixed = {"policy_type": "threshold", "optimize_metric": "mcc", "split_used": "val_calib",
             "n_thresholds": 5000, "class_names": ["None", "Roadwork"]}  # fmt: skip
    assert {key: document[key] for key in fixed} == fixed
    assert 0 <= document["threshold"] <= 1
    metrics = document["metrics"]
    counted = {"mcc", "accuracy", "precision", "recall", "f1", "fnr", "fpr", "tp", "tn", "fp", "fn"}
    assert set(metrics) == counted
    n = read_split(reproduced, "val_calib").num_rows
    assert sum(metrics[key] for key in ("tp", "tn", "fp", "fn")) == n
    assert metrics["accuracy"] == pytest.approx((metrics["tp"] + metrics["tn"]) / n)


def test_threshold_sweep_has_a_row_a_threshold(reproduced: Project) -> None:
    curve = rows(reproduced, "metrics/plots/threshold_sweep.csv")
    assert list(curve[0]) == ["threshold", "mcc", "tp", "tn", "fp", "fn"]
    assert len(curve) == reproduced.params()["sweep"]["n_thresholds"]
    n = read_split(reproduced, "val_calib").num_rows
    assert all(sum(float(row[key]) for key in ("tp", "tn", "fp", "fn")) == n for row in curve)
    best = reproduced.read_json("models/policy/thresholds.json")["metrics"]["mcc"]
    # `exact` looks at all cut points, the curve at a grid.
    assert max(float(row["mcc"]) for row in curve) <= best + 1e-12
    thin = rows(reproduced, "metrics/plots/mcc_curve.csv")
    known = {(row["threshold"], row["mcc"]) for row in curve}
    points = [(row["threshold"], row["mcc"]) for row in thin]
    assert len(points) == 101
    assert set(points) <= known
    assert points[0] == (curve[0]["threshold"], curve[0]["mcc"])
    assert points[-1] == (curve[-1]["threshold"], curve[-1]["mcc"])


def test_scrc_schema(reproduced: Project) -> None:
    document = reproduced.read_json("models/policy/scrc_params.json")
    assert document["policy_type"] == "scrc"
    assert set(document["metrics"]) == {"before", "after"}
    policy = document["scrc_params"]
    assert policy["fit_on"] == reproduced.params()["decision"]["fit_on"] == "served"
    assert policy["decision_threshold"] == 0.5
    assert policy["served_prior"] == reproduced.params()["decision"]["served_prior"]
    labels = read_split(reproduced, "val_calib").column("label").to_pylist()
    assert policy["calibration_prior"] == pytest.approx(sum(labels) / len(labels))
    assert {"calibrator", "threshold_shift", "abstention"} <= set(policy)


def test_bundle_schema(reproduced: Project) -> None:
    document = reproduced.read_json("models/bundle/bundle.json")
    assert document["policy_type"] == "scrc"
    assert document["policy"] == {"policy_type": "scrc", "policy_path": "scrc_params.json"}
    assert document["model_checkpoint"] == "model.safetensors"
    assert document["cvfm_weights"] is None
    assert document["class_names"] == ["None", "Roadwork"]
    preprocessing, train = document["classifier"]["preprocessing"], reproduced.params()["train"]
    assert (preprocessing["height"], preprocessing["width"]) == (
        train["height_px"], train["width_px"],
    )  # fmt: skip
    assert document["parameters"] == reproduced.read_json("metrics/train.json")["parameters"]
    files = {"model.safetensors", "model.pth", "scrc_params.json", "scrc_params.pkl"}
    assert set(document["files"]) == files
    for name, expected in document["files"].items():
        content = (reproduced / f"models/bundle/{name}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected
    assert (reproduced / "models/bundle/scrc_params.json").read_bytes() == (
        reproduced / "models/policy/scrc_params.json"
    ).read_bytes()


def test_manifests_name_what_went_in_and_out(reproduced: Project) -> None:
    stages = read_dvc_yaml(reproduced.root)["stages"]
    found = {path.name.split(".")[0]: path for path in reproduced.root.rglob("*.manifest.json")
             if ".dvc" not in path.parts}  # fmt: skip
    assert set(found) == set(STAGES) - {"check"}
    for name, path in found.items():
        document = json.loads(path.read_text())
        assert document["step"] == name
        for kind in ("inputs", "outputs"):
            for entry in document[kind]:
                content = (reproduced / entry["path"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry["path"]
                assert len(content) == entry["bytes"]
        written = {entry["path"] for entry in document["outputs"]}
        on_disk = reproduced.hashes(outputs(stages[name]))
        assert written == {n for n in on_disk if not n.endswith(".manifest.json")}, name
        data = [
            n
            for n in data_deps(stages[name])
            if not n.startswith("$") and not n.endswith(".manifest.json")
        ]
        data = [n for n in data if n != "data/params.checked"]
        read = {entry["path"] for entry in document["inputs"]}
        assert read == {n for n in reproduced.hashes(data) if not n.endswith(".manifest.json")}, (
            name
        )


def test_manifests_hash_exactly_the_tracked_parameters(reproduced: Project) -> None:
    """Else a parameter that reruns nothing would change bytes of a forced rerun."""
    params = reproduced.params()
    stages = read_dvc_yaml(reproduced.root)["stages"]
    for name in STAGES[1:]:
        path = next(
            p for p in reproduced.root.rglob(f"{name}.manifest.json") if ".dvc" not in p.parts
        )
        config = {key: value(params, key) for key in stages[name].get("params", [])}
        assert json.loads(path.read_text())["config_sha256"] == config_hash(config), name


@pytest.mark.slow
def test_stages_read_no_parameter_that_is_not_tracked(
    project: Project, reproduced: Project
) -> None:
    """Else a change of it would leave stale results; an untracked one is missing and fails here."""
    listed = every_output(project)
    project.run("rm", "-rf", *(f for f in OUT_FOLDERS))
    (project / "metrics/plots").mkdir(parents=True)
    project.python("-W", "ignore", "-c", BLIND)
    assert project.hashes(listed) == reproduced.hashes(listed)


def test_no_group_is_in_two_splits(reproduced: Project) -> None:
    home: dict[str, str] = {}
    total = 0
    for split in SPLITS:
        table = read_split(reproduced, split)
        assert table.schema.equals(SPLIT_SCHEMA)
        total += table.num_rows
        for group, fusion in zip(
            table.column("group").to_pylist(), table.column("fusion").to_pylist(), strict=True
        ):
            part = f"{split}/fusion" if fusion else split
            assert home.setdefault(group, part) == part
        assert (split == "train") == any(table.column("fusion").to_pylist())
        assert len(set(table.column("label").to_pylist())) == 2
    report = reproduced.read_json("metrics/data.json")
    assert report["shared_groups"] == 0
    assert report["rows_kept"] == total == 480
    assert len(home) == report["groups"]["total"]


def test_predictions_are_of_every_test_image(reproduced: Project) -> None:
    table = read_split(reproduced, "val_test")
    predicted = rows(reproduced, "metrics/plots/predictions.csv")
    for name in ("id", "group"):
        assert [row[name] for row in predicted] == table.column(name).to_pylist()
    assert [int(row["label"]) for row in predicted] == table.column("label").to_pylist()
    confusion = reproduced.read_json("metrics/evaluation.json")["confusion"]
    called = [float(row["probability"]) > 0.5 for row in predicted]
    truth = [row["label"] == "1" for row in predicted]
    assert sum(c and t for c, t in zip(called, truth, strict=True)) == confusion["tp"]
    assert sum(c and not t for c, t in zip(called, truth, strict=True)) == confusion["fp"]


def test_curves_are_of_the_predictions(reproduced: Project) -> None:
    predicted = rows(reproduced, "metrics/plots/predictions.csv")
    labels = [int(row["label"]) for row in predicted]
    probabilities = [float(row["probability"]) for row in predicted]
    prior = reproduced.params()["decision"]["served_prior"]
    for name, table in (
        ("roc", curves.roc_curve(labels, probabilities)),
        ("precision_recall", curves.precision_recall_curve(labels, probabilities, prior)),
        ("reliability", curves.reliability_table(labels, probabilities, prior, "as served")),
    ):
        found = rows(reproduced, f"metrics/plots/{name}.csv")
        assert {key: [row[key] for row in found] for key in found[0]} == {
            key: [str(value) for value in values] for key, values in table.items()
        }
    calibration = rows(reproduced, "metrics/plots/calibration.csv")
    n = len(read_embeddings(reproduced / "data/embeddings/val_calib_served.arrow").labels)
    for panel in ("before, at the served prior", "after, in sample"):
        assert sum(int(row["images"]) for row in calibration if row["panel"] == panel) == n


def test_run_log_has_a_line_a_stage(reproduced: Project) -> None:
    lines = (reproduced / ".streetvision/runs.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    steps = [entry["step"] for entry in entries]
    assert steps[:-3] == list(STAGES[:-3])
    assert sorted(steps[-3:-1]) == sorted(STAGES[-3:-1])  # neither needs the other
    assert steps[-1] == STAGES[-1]
    assert all(entry["status"] == "ok" and entry["seconds"] > 0 for entry in entries)


# --------------------------------------------------------------------------- determinism


def test_same_seed_same_bytes_elsewhere_with_other_workers(
    reproduced: Project, repeated: Project
) -> None:
    tops = every_output(reproduced)
    assert repeated.hashes(tops) == reproduced.hashes(tops)
    assert reproduced.params()["hardware"]["workers"] == 1
    assert "workers: 2" in (repeated / "streetvision/presets/smoke.yaml").read_text()


# --------------------------------------------------------------------------- what reruns


def test_second_repro_runs_nothing(project: Project) -> None:
    before = project.hashes(every_output(project))
    assert project.repro() == []
    assert json.loads(project.dvc("status", "--json").stdout) == {}
    assert project.hashes(every_output(project)) == before
    assert project.git("status", "--porcelain").stdout == ""


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"hardware": {"workers": 2, "device": "cpu"}}, []),
        ({"gates": {"max_mcc_drop": 0.5, "max_ece": None, "min_reward": 0.1}}, []),
        ({"data": {"side_px": 40}}, ["prepare"]),
        ({"data": {"shard_images": 60}}, ["ingest"]),
        ({"explora": {"temperature": 0.2}}, ["explora"]),
        ({"probe": {"inverse_l2": 1.0}}, ["probe"]),
        ({"train": {"learning_rate": 0.001}}, ["train"]),
        ({"train": {"backbone": "street_vit"}}, ["explora", "probe", "train"]),
        ({"compile": {"mode": "max-autotune"}}, ["explora", "train"]),
        ({"views": {"grid": 2}}, ["embed", "cvfm"]),
        ({"embed": {"batch_size": 32}}, ["probe", "embed", "export"]),
        ({"cvfm": {"mode": "single"}}, ["cvfm"]),
        ({"embed": {"served_repeats": 2}}, ["embed"]),
        ({"decision": {"fit_on": "clean"}}, ["cvfm", "calibrate", "export"]),
        ({"decision": {"exchangeable_unit": "drive"}}, ["calibrate"]),
        ({"decision": {"hard_image_views": "all"}}, ["calibrate"]),
        ({"subnet": {"validator": "letterbox"}}, ["train", "embed", "export", "challenge"]),
        ({"sweep": {"n_thresholds": 100}}, ["sweep"]),
        ({"decision": {"served_prior": 0.4}}, ["calibrate", "evaluate", "challenge"]),
        ({"export": {"make_tar": True}}, ["export"]),
        ({"evaluate": {"mistakes": 3}}, ["evaluate"]),
        ({"challenge": {"rival_accuracy": 0.9}}, ["challenge"]),
        ({"seed": 8}, [stage for stage in STAGES[1:-1] if stage != "prepare"]),
        ({"data": {"split_seed": 8}}, ["prepare"]),
    ],
    ids=lambda x: json.dumps(x) if isinstance(x, dict) else "",
)
def test_parameter_invalidates_only_the_stages_that_use_it(
    project: Project, changes: dict[str, object], stages: list[str]
) -> None:
    assert set(leaves(changes)) <= set(leaves(project.params()))
    project.change(changes)
    # `status` names the stages that a parameter reaches directly, not those after them.
    status = json.loads(project.dvc("status", "--json").stdout)
    assert sorted(status) == sorted(["check", *stages])


def test_changed_prior_reruns_calibrate_and_what_follows(project: Project) -> None:
    early = ["data/raw", "data/splits", "data/embeddings", "models/classifier"]
    before = project.hashes(early)
    old = project.read_json("models/policy/scrc_params.json")["scrc_params"]
    project.change({"decision": {"served_prior": 0.3}})
    after = {"calibrate", "export", "evaluate", "challenge", "headline"}
    assert set(project.repro()) == after
    assert project.hashes(early) == before
    new = project.read_json("models/bundle/scrc_params.json")["scrc_params"]
    assert (old["served_prior"], new["served_prior"]) == (0.5, 0.3)
    # The map is fitted at the prior of the data: the shift comes after it.
    assert new["calibrator"] == old["calibrator"]
    # Back again: everything comes from the run cache.
    project.change({"decision": {"served_prior": 0.5}})
    output = project.dvc("repro").stdout
    assert "Running stage" not in output
    assert project.git("status", "--porcelain").stdout == ""


def test_the_rows_of_the_plotted_curve_rerun_sweep_alone(project: Project) -> None:
    old = project.read_json("models/policy/threshold.json")
    project.change({"sweep": {"n_thresholds": 100}})
    assert project.repro() == ["sweep"]
    document = project.read_json("models/policy/thresholds.json")
    assert document["n_thresholds"] == 100
    assert project.read_json("models/policy/threshold.json") == old
    assert old == {"threshold": document["threshold"]}


def test_changed_learning_rate_reruns_no_data_stage(project: Project) -> None:
    project.change({"train": {"learning_rate": 0.001, "epochs": 1}})
    assert project.repro("train") == ["train"]


def test_changed_code_reruns_the_stages_that_import_it(project: Project) -> None:
    name = "streetvision/decision/policy.py"
    (project / name).write_text((project / name).read_text() + "\n# changed\n")
    status = json.loads(project.dvc("status", "--json").stdout)
    stages = read_dvc_yaml(project.root)["stages"]
    room = "streetvision/decision"
    assert set(status) == {stage for stage, entry in stages.items() if room in entry["deps"]}
    assert "calibrate" in status
    assert not {"ingest", "prepare", "train", "embed"} & set(status)


def test_new_local_image_reruns_ingest(light: Project) -> None:
    folder = light / "data/local/none/street"
    for name, colour in (("roadwork/site", 200), ("none/street", 90)):
        (light / f"data/local/{name}").mkdir(parents=True)
        Image.new("L", (32, 24), colour).save(light / f"data/local/{name}/a.jpg")
    light.change({"data": {"sources": [{"kind": "folder", "name": "mine", "path": "."}]}})
    with_git(light).dvc("init", "--force", "--quiet")
    assert light.repro("ingest") == ["ingest"]
    assert light.repro("ingest") == []
    Image.new("L", (32, 24), 30).save(folder / "b.jpg")
    assert light.repro("ingest") == ["ingest"]
    report = light.read_json("data/raw/ingest.manifest.json")["metrics"]
    assert report["total"]["rows"] == 3
