"""`dvc.yaml` against the code it runs, the parameters, the paths and the split contract; runs no stage."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.imports import import_closure
from streetvision.core.params import Params, leaves
from streetvision.core.schema import CONDITIONS, SPLITS
from streetvision.data.store import CONTRACT, SplitAccessError, open_split
from tests.pipeline.project import (
    CACHED_METRICS,
    REPOSITORY,
    STAGES,
    code_deps,
    contract_violations,
    data_deps,
    names,
    outputs,
    read_dvc_yaml,
)

DOCUMENT = read_dvc_yaml(REPOSITORY)
STAGE = DOCUMENT["stages"]
# The split contract as it was agreed, in which `embed` reads for the stages after it: which splits a stage may
# see at all. TRAIN is for gradients, VAL_SELECT for choosing models, VAL_CALIB for the decision, VAL_TEST for
# the report.
# What no result depends on: parameters are tracked by value, the rest reads, writes, reports and times.
WITHOUT_RESULT = {"__init__.py", "core"}
AGREED = {
    "check": set(),
    "ingest": set(),
    "prepare": set(),
    "explora": {"train", "val_select"},
    "probe": {"train", "val_select"},
    "train": {"train", "val_select"},
    "embed": {"train", "val_select", "val_calib"},
    "sweep": {"val_calib"},
    "cvfm": {"train", "train_served", "val_select", "val_select_served"},
    "calibrate": {"val_calib", "val_calib_served"},
    "export": {"val_select", "val_calib"},
    "evaluate": {"val_test"},
    "challenge": {"val_test", "val_test_originals"},
    "headline": set(),
}


@pytest.mark.parametrize("name", STAGES)
def test_code_deps_are_the_rooms_that_the_stage_imports(name: str) -> None:
    needed = {f"stages/{name}.py"}
    for path in import_closure(f"stages.{name}", REPOSITORY):
        parts = path.relative_to(REPOSITORY).parts
        if parts[0] == "streetvision" and parts[1] not in WITHOUT_RESULT:
            needed.add("/".join(parts[:2]))
    listed = code_deps(STAGE[name])
    change = [f"add    - {path}" for path in sorted(needed - set(listed))]
    change += [f"remove - {path}" for path in sorted(set(listed) - needed)]
    assert not change, "\n".join([f"dvc.yaml, stages.{name}.deps:", *change])
    assert listed == sorted(set(listed))


def test_the_decision_changes_nothing_before_the_sweep() -> None:
    for name in STAGES[: STAGES.index("sweep")]:
        assert not {"streetvision/decision", "streetvision/fusion"} & set(STAGE[name]["deps"]), name
        assert not [key for key in STAGE[name].get("params", []) if key.startswith("decision")]


def test_stages_commands_and_flags() -> None:
    # `headline` runs last and is written before `train`: DVC's tables show metrics in this order.
    written = list(STAGE)
    assert written[written.index("headline") + 1] == "train"
    written.remove("headline")
    assert (*written, "headline") == STAGES
    for name, stage in STAGE.items():
        assert stage["cmd"] == f"python -m stages.{name}"
        assert stage["desc"]
        assert (REPOSITORY / f"stages/{name}.py").is_file()
        for kind in ("outs", "metrics", "plots"):
            for entry in stage.get(kind, []):
                path, flags = (
                    next(iter(entry.items())) if isinstance(entry, Mapping) else (entry, {})
                )
                # `persist` turns off the run cache of the whole stage; metrics and plots live in Git.
                # (As `outs` without a cache they would turn it off, too.)
                in_git = path.startswith("metrics/") and path not in CACHED_METRICS
                assert flags.get("cache", True) != in_git, (name, entry)
                assert "persist" not in flags
                assert in_git == (kind != "outs"), (name, entry)


def test_dvcs_tables_show_the_headline_and_val_select() -> None:
    shown = [name for stage in STAGE.values() for name in names(stage.get("metrics", []))]
    assert shown == ["metrics/headline.json", "metrics/train.json"]
    assert "metrics" not in DOCUMENT


def test_every_stage_begins_with_the_check_of_the_parameters() -> None:
    assert data_deps(STAGE["check"]) == ["params.yaml"]
    assert outputs(STAGE["check"])[0] in STAGE["ingest"]["deps"]


def test_params_are_the_leaves_of_the_schema() -> None:
    every = set(leaves(Params().model_dump(mode="json")))
    tracked = set()
    for name, stage in STAGE.items():
        listed = stage.get("params", [])
        found = [key for key in every if key in listed or key.partition(".")[0] in listed]
        assert len(listed) == len(set(listed)), name
        assert all(
            key in every or any(each.startswith(f"{key}.") for each in every) for key in listed
        )
        assert len({*found, *listed}) == len(found) + len(set(listed) - every), name
        tracked |= set(found)
    assert tracked == {key for key in every if not key.startswith(("gates.", "hardware."))}
    # DVC's run-cache key drops these two words at any depth.
    parts = {part for key in every for part in key.split(".")}
    assert not parts & {"size", "nfiles"}


def test_paths_are_those_of_the_schema() -> None:
    paths = ArtifactSchema(Path())
    fixed = {
        paths.checked, paths.raw, paths.originals, paths.quarantine, paths.explora, paths.classifier,
        paths.thresholds, paths.threshold, paths.scrc_params, paths.scrc_pickle, paths.cvfm, paths.bundle,
        *(paths.split(name) for name in SPLITS),
        *(paths.embeddings(name, each) for name in CONTRACT["embed"] for each in CONDITIONS),
    }  # fmt: skip
    written = [Path(name) for stage in STAGE.values() for name in outputs(stage)]
    read = [Path(name) for stage in STAGE.values() for name in data_deps(stage)]
    assert len(written) == len(set(written)), "two stages write one file"
    assert fixed <= set(written)
    # `check` makes a constant, of which there is nothing to record.
    manifests = {name: paths.manifest(name) for name in STAGE if name != "check"}
    for manifest in manifests.values():
        assert manifest in written or manifest.parent in written, manifest
    known = fixed | set(manifests.values()) | {Path(name) for name in CACHED_METRICS}
    for stage in STAGE.values():
        assert {Path(name) for name in names(stage.get("outs", []))} <= known
        for name in names([*stage.get("metrics", []), *stage.get("plots", [])]):
            path = Path(name)
            assert path in {paths.metric(path.stem), paths.plot(path.name)}
    others = [name for name in read if name not in known | set(written)]
    assert others == [Path("params.yaml"), Path("${data.local_root}")]
    # A stage may not write into a folder that is another's out as a whole.
    for path in written:
        assert not set(path.parents) & set(written), path


def test_top_level_plots_draw_files_that_a_stage_writes() -> None:
    written = {name for stage in STAGE.values() for name in outputs(stage)}
    for plot in DOCUMENT["plots"]:
        for settings in plot.values():
            assert set(settings["y"]) <= written


def test_the_bundle_is_an_artifact_that_dvc_reads() -> None:
    from dvc.repo import Repo

    with Repo(str(REPOSITORY)) as repo:
        found = repo.artifacts.read()["dvc.yaml"]
    assert list(found) == ["roadwork-detector"]
    artifact = found["roadwork-detector"]
    assert Path(artifact.path) == ArtifactSchema(Path()).bundle
    assert artifact.path in outputs(STAGE["export"])
    assert artifact.type == "model"
    assert artifact.desc
    assert artifact.labels


def test_split_contract() -> None:
    assert contract_violations(DOCUMENT) == []
    # `crossval` is a command, not a stage: it makes folds of its own and sees none of the four splits.
    assert not set(CONTRACT.get("crossval", {})) & set(SPLITS)
    assert set(CONTRACT) - {"crossval"} <= set(STAGES)
    for name, stage in STAGE.items():
        seen = {Path(path).stem for path in data_deps(stage) if path.endswith(".arrow")}
        assert seen == AGREED[name], name
        assert set(CONTRACT.get(name, {})) <= AGREED[name]
    for name in ("explora", "probe", "train"):
        assert CONTRACT[name]["train"].rows == "fit", f"{name} fits on the fusion part"
    assert not any(access.labels for access in CONTRACT["explora"].values())
    assert CONTRACT["embed"]["train"].rows == "fusion"
    assert not CONTRACT["export"]["val_calib"].labels


def test_contract_check_notices_a_leak() -> None:
    for name in STAGES[STAGES.index("explora") : STAGES.index("evaluate")]:
        document = read_dvc_yaml(REPOSITORY)
        document["stages"][name]["deps"].append("data/splits/val_test.arrow")
        assert contract_violations(document) == [
            f"{name} lists data/splits/val_test.arrow, not declared"
        ]
    document = read_dvc_yaml(REPOSITORY)
    document["stages"]["train"]["deps"].append("data/splits")
    document["stages"]["sweep"]["deps"].remove("data/embeddings/val_calib.arrow")
    assert len(contract_violations(document)) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_store_refuses_what_a_stage_did_not_declare(stage: str, tmp_path: Path) -> None:
    for split in set(SPLITS) - set(CONTRACT.get(stage, {})):
        with pytest.raises(SplitAccessError, match=f"`{stage}` did not declare the split {split}"):
            open_split(stage, split, tmp_path / "x.arrow")


def test_runtime_order_follows_from_deps() -> None:
    maker = {name: stage for stage, entry in STAGE.items() for name in outputs(entry)}

    def before(stage: str) -> set[str]:
        direct = {maker[name] for name in data_deps(STAGE[stage]) if name in maker}
        return direct.union(*(before(name) for name in direct))

    # Nothing but the headline follows the two reports, nothing the probe of the adaptation.
    reports = {"evaluate", "challenge", "probe", "headline"}
    chain = [name for name in STAGES if name not in reports]
    ends = [("export", "evaluate"), ("export", "challenge"), ("explora", "probe")]
    ends += [("evaluate", "headline"), ("challenge", "headline")]
    for earlier, later in [*pairwise(chain), *ends]:
        assert earlier in before(later), f"{earlier} must run before {later}; no dep says so"
        assert later not in before(earlier)
    assert not [stage for stage in STAGES if before(stage) & reports and stage != "headline"]


def ignored(name: str) -> bool:
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--quiet", name], cwd=REPOSITORY, check=False
    )
    return done.returncode == 0


def test_ignore_patterns_are_anchored() -> None:
    for name in ("streetvision/data/x.py", "streetvision/models/x.py", "tests/data/x.py",
                 "data/local/README.md", "metrics/data.json", "metrics/headline.json",
                 "metrics/plots/roc.csv", "metrics/plots/mcc_curve.csv", "dvc.lock",
                 "params.yaml"):  # fmt: skip
        assert not ignored(name), f"Git would ignore {name}"
    for stage in STAGE.values():
        for name in names(stage.get("outs", [])):
            assert ignored(f"{name}" if Path(name).suffix else f"{name}/x"), name
    for name in (".streetvision/runs.jsonl", "data/local/mine.jpg", "stages/__pycache__/x.pyc",
                 "dvc_plots/index.html"):  # fmt: skip
        assert ignored(name), name
    patterns = (REPOSITORY / ".dvcignore").read_text().split()
    assert "__pycache__" in patterns
    # DVC must see every source file and every out.
    assert not [
        p for p in patterns if p.strip("/") in {"data", "models", "metrics", "streetvision"}
    ]
