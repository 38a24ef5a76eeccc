"""VAL_TEST's labels reach nothing before `evaluate`: shown by running on corrupted ones."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest
import yaml

from tests.pipeline.project import Project, contract_violations, outputs, read_dvc_yaml

VAL_TEST = "data/splits/val_test.arrow"
# Takes the served prior from the test labels: one number of them in the deployed policy.
CHEAT = '''
def cheating(stage: Stage) -> None:
    """Calibrate for the test split's own share of roadwork."""
    from dataclasses import replace

    from streetvision.data.store import read_arrow

    labels = read_arrow(stage.paths.split("val_test"), "prepare").column("label").to_numpy()
    decision = stage.params.decision.model_copy(update={"served_prior": float(labels.mean())})
    calibrate(replace(stage, params=stage.params.model_copy(update={"decision": decision})))


if __name__ == "__main__":
    run_stage("calibrate", __doc__, cheating)
'''


def labels_of(project: Project) -> list[int]:
    with pa.OSFile(str(project / VAL_TEST)) as source:
        labels: list[int] = pa.ipc.open_file(source).read_all().column("label").to_pylist()
    return labels


def corrupt(project: Project) -> None:
    """Flip VAL_TEST's labels and let DVC take that for what `prepare` wrote."""
    path = project / VAL_TEST
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    flipped = pa.array([1 - label for label in table.column("label").to_pylist()], pa.int8())
    place = table.schema.get_field_index("label")
    table = table.set_column(place, table.schema.field("label"), flipped)
    path.unlink()  # never through a link into DVC's cache
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    project.dvc("commit", "--force", "prepare")


def changed_by_corruption(project: Project, stages: Sequence[str]) -> list[str]:
    """Rerun `stages` on corrupted test labels; return the files that differ from before."""
    document = read_dvc_yaml(project.root)["stages"]
    written = [name for stage in stages for name in outputs(document[stage])]
    labels, before = labels_of(project), project.hashes(written)
    corrupt(project)
    output = project.dvc("repro", "--force", "--single-item", *stages).stdout
    for stage in stages:
        assert f"Running stage '{stage}'" in output, "not rerun, so nothing is shown"
    # DVC restores an edited output where it can: what was read must still be corrupt.
    assert labels_of(project) == [1 - label for label in labels]
    after = project.hashes(written)
    assert after.keys() == before.keys()
    return [name for name in after if after[name] != before[name]]


@pytest.mark.slow
def test_test_labels_change_nothing_before_the_report(project: Project) -> None:
    mcc = project.read_json("metrics/evaluation.json")["mcc"]
    stages = ["explora", "probe", "train", "embed", "sweep", "cvfm", "calibrate", "export"]
    assert changed_by_corruption(project, stages) == []
    # And the corruption is one that shows where the labels are read.
    assert set(project.repro()) == {"evaluate", "challenge", "headline"}
    assert project.read_json("metrics/evaluation.json")["mcc"] == pytest.approx(-mcc)


@pytest.mark.slow
def test_a_stage_that_cheats_is_caught(project: Project) -> None:
    script = project / "stages/calibrate.py"
    honest = script.read_text().partition('if __name__ == "__main__":')[0]
    script.write_text(honest + CHEAT)
    document = read_dvc_yaml(project.root)
    document["stages"]["calibrate"]["deps"].append(VAL_TEST)
    (project / "dvc.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert contract_violations(document) == [f"calibrate lists {VAL_TEST}, not declared"]
    project.repro("calibrate")
    assert "models/policy/scrc_params.json" in changed_by_corruption(project, ["calibrate"])
