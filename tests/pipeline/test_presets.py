"""Each preset as far as a machine without a GPU or a network can take it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from streetvision.core.params import Params
from streetvision.presets import load_preset, preset_names
from tests.pipeline.project import REPOSITORY, Project, copy_code

sys.path.insert(0, str(Path(__file__).parents[1] / "sources"))
from fake_hub import FakeHub

PHOTOS = REPOSITORY.parent / "shared/photos/labels.csv"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_names_and_values() -> None:
    assert preset_names() == ["cpu-demo", "natix-gpu", "photos", "smoke"]
    assert load_preset("cpu-demo", REPOSITORY) == Params()
    assert Project(REPOSITORY).params() == Params().model_dump(mode="json")


def test_smoke_leaves_no_trace_in_params(reproduced: Project, repeated: Project) -> None:
    changed = repeated.git("status", "--porcelain", "params.yaml", ".streetvision").stdout
    assert changed == ""
    assert (repeated / "params.yaml").read_text().endswith("# a line of the user's\n")
    assert repeated.params() == Params().model_dump(mode="json")
    assert not list((repeated / ".streetvision").glob("params.yaml.*"))
    assert repeated.hashes(["metrics"]) == reproduced.hashes(["metrics"])


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason=f"the real photographs are not here: {PHOTOS}")
def test_photos(tmp_path: Path) -> None:
    """Ingest and prepare as they are; one epoch of training on small inputs."""
    project = copy_code(tmp_path / "project", "photos")
    project.stage("ingest")
    project.stage("prepare")
    report = project.read_json("metrics/data.json")
    listed = len(PHOTOS.read_text().splitlines()) - 1
    assert report["rows_in"] == listed
    assert report["rows_kept"] + sum(report["quarantined"].values()) == listed
    assert report["rows_kept"] >= 0.98 * listed
    assert report["shared_groups"] == 0
    project.change({"train": {"epochs": 1, "height_px": 32, "width_px": 32}})
    project.stage("explora")
    project.stage("train")
    metrics = project.read_json("metrics/train.json")
    assert metrics["parameters"] == 2_225_153  # MobileNetV2's 2,223,872 and a head of 1,281
    assert metrics["train_images"] > 100


# --------------------------------------------------------------------------- natix-gpu


def shard(first: int, rows: int) -> bytes:
    """Parquet as the data set publishes it: image structs, labels, descriptions, positions."""
    images = []
    for row in range(first, first + rows):
        pixels = np.random.default_rng(row).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((400, 300), Image.Resampling.NEAREST).save(buffer, "JPEG")
        images.append({"bytes": buffer.getvalue(), "path": f"{row}.jpg"})
    labels = [int(row % 4 != 0) for row in range(first, first + rows)]
    table = pa.table({
        "image": images,
        "label": pa.array(labels, pa.int64()),
        "scene_description": [f"cones {row}" if on else "" for row, on in enumerate(labels)],
        # Four images a place, places kilometres apart.
        "latitude": [30 + (row // 4) * 0.1 for row in range(first, first + rows)],
        "longitude": [10.0] * rows,
    })  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    files = {f"data/train-{n:05d}.parquet": shard(40 * n, 40) for n in range(2)}
    with FakeHub("natix-network-org/roadwork", REVISION, files) as server:
        yield server


@pytest.mark.slow
def test_natix_gpu(tmp_path: Path, hub: FakeHub) -> None:
    pytest.importorskip("huggingface_hub")
    project = copy_code(tmp_path / "project", "natix-gpu")
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    done = project.stage("ingest", check=False, env=env)
    assert done.returncode == 2
    assert "python -m streetvision pin natix-network-org/roadwork" in done.stderr
    assert len(done.stderr.splitlines()) == 1

    sources = project.params()["data"]["sources"]
    project.change({"data": {"sources": [sources[0] | {"revision": REVISION}]}})
    project.stage("ingest", env=env)
    project.stage("prepare")
    report = project.read_json("metrics/data.json")
    assert report["rows_kept"] == 80
    assert report["groups"]["total"] == 20
    # A smaller network of the same family: building 300 million weights only to miss them takes long.
    project.change({"train": {"backbone": "vit_small_patch16_dinov3.lvd1689m"}})
    done = project.stage("explora", check=False, env=env)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("explora: error: weights of vit_small_patch16_dinov3.lvd1689m")
    assert "give a local file in train.weights or none" in lines[0]
