"""Fixtures that many tests share: tiny splits of easy images, a tiny trained classifier, its bundle."""

from __future__ import annotations

import io
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts its threads; child processes inherit it

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import settings
from PIL import Image

from streetvision.core.params import Cvfm, Hardware, Train, ViewGrid
from streetvision.core.schema import SPLIT_SCHEMA, SPLITS
from streetvision.data.store import open_split

torch.set_num_threads(1)
# The same examples in every run; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)  # no test is timed
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

ROOT = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


def easy_image(rng: np.random.Generator, label: int, width: int, height: int) -> Image.Image:
    """Grey noise; roadwork is a large orange block on it."""
    pixels = rng.integers(40, 200, (height, width, 3), dtype=np.uint8)
    if label:
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        pixels[top : top + height // 2, left : left + width // 2] = (250, 120, 10)
    return Image.fromarray(pixels)


def write_easy_split(
    path: Path,
    n: int = 48,
    *,
    seed: int = 0,
    groups: int = 8,
    labels: Sequence[int] | None = None,
    fusion_groups: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Path:
    """Write a split file of `n` images; labels alternate, the first `fusion_groups` are fusion's."""
    rng = np.random.default_rng(seed)
    wanted = list(labels) if labels is not None else [row % 2 for row in range(n)]
    rows = []
    for row, label in enumerate(wanted):
        data = io.BytesIO()
        easy_image(rng, label, *size).save(data, "JPEG", quality=92)
        group = (row // 2) % groups
        area = (0.001, 0.005, 0.02, 0.2)[row // 2 % 4] ** 0.5
        rows.append(
            {
                "id": f"{path.stem}-{row:04d}",
                "image": data.getvalue(),
                "label": label,
                "source": "easy",
                "group": f"{path.stem}-g{group}",
                "drive": f"{path.stem}-g{group}-d0",
                "weather": ("sunny", "rain", None)[row % 3],
                "daytime": ("day", "night")[row // 4 % 2],
                "evidence_box": [0.1, 0.1, 0.1 + area, 0.1 + area] if label else None,
                "width": size[0],
                "height": size[1],
                "original_width": size[0],
                "original_height": size[1],
                "fusion": group < fusion_groups,
            }
        )
    table = pa.Table.from_pylist(rows, schema=SPLIT_SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


@pytest.fixture(scope="session")
def write_split() -> Callable[..., Path]:
    return write_easy_split


@pytest.fixture(scope="session")
def tiny_splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four split files by name, without a shared group; TRAIN has a fusion part."""
    folder = tmp_path_factory.mktemp("splits")
    return {
        name: write_easy_split(
            folder / f"{name}.arrow",
            64 if name == "train" else 40,
            seed=number,
            fusion_groups=2 if name == "train" else 0,
        )
        for number, name in enumerate(SPLITS)
    }


@pytest.fixture(scope="session")
def tiny_train() -> Train:
    """Parameters of a training run of a second."""
    return Train(
        served_probability=0.0,
        backbone="street_resnet_tiny", height_px=HEIGHT, width_px=WIDTH, epochs=2, batch_size=16,
        learning_rate=0.01, precision="fp32",
    )  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A classifier folder, fusion of a single view, policy files and the bundle made of them."""

    classifier: Path
    cvfm: Path
    scrc_params: Path
    scrc_pickle: Path
    bundle: Path


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_splits: dict[str, Path], tiny_train: Train
) -> Trained:
    """Everything up to the bundle, trained on the tiny splits; read only."""
    from streetvision.bundle.export import export_bundle
    from streetvision.core.artifacts import write_bytes_atomic, write_json_atomic
    from streetvision.decision.pickling import dump_policy_pickle
    from streetvision.decision.policy import fit_policy, scrc_document
    from streetvision.fusion.fusion import Fusion, FusionConfig, save_fusion
    from streetvision.models.classifier import save_classifier, score_split
    from streetvision.training.training import build_classifier, fit_classifier

    folder = tmp_path_factory.mktemp("trained")
    model, config = build_classifier(tiny_train, seed=7, root=folder)
    result = fit_classifier(
        model, config, tiny_train,
        open_split("train", "train", tiny_splits["train"]),
        open_split("train", "val_select", tiny_splits["val_select"]),
        seed=7, scratch=folder / "scratch", hardware=Hardware(device="cpu"),
    )  # fmt: skip
    save_classifier(result.model, config, folder / "classifier")
    calib = open_split("embed", "val_calib", tiny_splits["val_calib"])
    device = torch.device("cpu")
    logits, _ = score_split(result.model, config.preprocessing, calib, 16, device)
    policy, report = fit_policy(logits, calib.labels, calib.groups, 0.5, 200, 7)
    document = scrc_document(policy, report)
    made = Trained(
        folder / "classifier", folder / "cvfm", folder / "scrc_params.json", folder / "scrc_params.pkl",
        folder / "bundle",
    )  # fmt: skip
    save_fusion(Fusion(FusionConfig.of("single", Cvfm(), ViewGrid(), 0)), made.cvfm)
    write_json_atomic(made.scrc_params, document)
    write_bytes_atomic(made.scrc_pickle, dump_policy_pickle(document))
    export_bundle(
        made.classifier, made.scrc_params, made.scrc_pickle, made.bundle, cvfm=made.cvfm,
        batch_size=16, make_tar=True,
    )  # fmt: skip
    return made
