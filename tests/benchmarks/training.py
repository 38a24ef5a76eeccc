"""Training against what one would write instead, and the memory of each way to train.

Both sides of a pair see the same images, already decoded where theirs would be read from files, the same
model, batch size and number of steps; ours includes its checkpoints and its look at VAL_SELECT.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.runner import Result, Table, compare

MEMORY_MODEL = "vit_small_patch16_224"
PARTS = ("full", "last_n_blocks", "head", "lora", "dora")


def make_splits(folder: Path, images: int, height: int, width: int) -> dict[str, Path]:
    """Split files of smooth noise: `images` for TRAIN, 8 for VAL_SELECT."""
    from PIL import Image

    rng = np.random.default_rng(0)
    paths = {}
    for name, count in (("train", images), ("val_select", 8)):
        jpegs = []
        for _ in range(count):
            small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(buffer, "JPEG", quality=92)
            jpegs.append(buffer.getvalue())
        paths[name] = write_split(folder / f"{name}.arrow", jpegs, width, height)
    return paths


def write_split(path: Path, jpegs: list[bytes], width: int, height: int) -> Path:
    """A split file of these images, labels alternating, eight of a group."""
    import pyarrow as pa

    from streetvision.core.schema import SPLIT_SCHEMA

    rows = [
        {
            "id": f"{path.stem}{row}", "image": image, "label": row % 2, "source": "noise",
            "group": f"{path.stem}{row // 8}", "width": width, "height": height,
            "original_width": width, "original_height": height, "fusion": False,
        }
        for row, image in enumerate(jpegs)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=SPLIT_SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return path


@contextmanager
def bench_splits(images: int, height: int, width: int, stage: str = "train") -> Iterator[Any]:
    """The opened splits and a folder for scratch."""
    from streetvision.data.store import open_split

    with tempfile.TemporaryDirectory() as folder:
        paths = make_splits(Path(folder), images, height, width)
        splits = {name: open_split(stage, name, path) for name, path in paths.items()}
        yield splits, Path(folder)


def fit(train: Any, splits: Any, folder: Path, **sections: Any) -> Any:
    """Our `fit_classifier` and its result, from the start, on whatever device there is."""
    from streetvision.training.training import build_classifier, fit_classifier

    model, config = build_classifier(train, 0, folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return fit_classifier(
            model, config, train, splits["train"], splits["val_select"], seed=0,
            scratch=Path(scratch), **sections,
        )  # fmt: skip


def plain_fit(train: Any, split: Any) -> Callable[[], None]:
    """timm, AdamW, torchvision v2 and a DataLoader: FP32, eager; decoding is done before."""
    import timm
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    from streetvision.models.backbone import resolve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, arguments, mean, std = resolve(train.backbone, train.height_px, train.width_px)
    images = torch.stack(
        [
            torch.from_numpy(np.asarray(split.image(row)).copy()).permute(2, 0, 1)
            for row in range(len(split))
        ]
    )
    labels = torch.from_numpy(split.labels).float()
    aspect = train.width_px / train.height_px
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(
                (train.height_px, train.width_px), scale=(train.crop_min_area, 1.0),
                ratio=(aspect * 3 / 4, aspect * 4 / 3), antialias=True,
            ),
            v2.RandomHorizontalFlip(train.flip_probability),
            v2.ColorJitter(*[train.colour_jitter] * 3),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )  # fmt: skip

    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, row: int) -> Any:
            return augment(images[row]), labels[row]

    def run() -> None:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=1, **arguments).to(device).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay
        )
        workers = 8 if device == "cuda" else 0
        loader = DataLoader(
            Images(), train.batch_size, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        for _ in range(train.epochs):
            for batch, targets in loader:
                logits = model(batch.to(device)).squeeze(1)
                loss = nn.functional.binary_cross_entropy_with_logits(logits, targets.to(device))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clip)
                optimizer.step()
        loss.item()  # waits for a GPU

    return run


def train() -> list[Result]:
    """Supervised training of the default model."""
    from streetvision.core.params import Train

    settings = Train(epochs=2, init_from_explora=False, served_probability=0.0)
    with bench_splits(512, settings.height_px, settings.width_px) as (splits, folder):
        images = settings.epochs * len(splits["train"])
        result = compare(
            f"train, street_resnet 128 × 96, {images:,} images, augmented",
            "timm + AdamW + DataLoader, FP32, eager",
            lambda: fit(settings, splits, folder),
            plain_fit(settings, splits["train"]),
            reach=1,
        )
    return [result]


def explora() -> list[Result]:
    """SimCLR with every weight trained against lightly's transform, head and loss."""
    from streetvision.core.params import Compile, Explora, Hardware
    from streetvision.data.transforms import Preprocessing
    from streetvision.explora.pretraining import adapt_backbone
    from streetvision.models.backbone import build_backbone, resolve

    side = 96
    settings = Explora(enabled=True, epochs=1, batch_size=128)
    name, arguments, mean, std = resolve("street_resnet", side, side)
    preprocessing = Preprocessing(side, side, "crop", mean, std)
    with bench_splits(1024, side, side, "explora") as (splits, folder):

        def ours() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                adapt_backbone(
                    build_backbone(name, arguments), settings, splits["train"],
                    splits["val_select"], preprocessing, pretrained=False, freeze_norm=False,
                    seed=0, scratch=Path(scratch), hardware=Hardware(), compile_settings=Compile(),
                )  # fmt: skip

        images = settings.epochs * len(splits["train"])
        result = compare(
            f"explora, SimCLR, street_resnet {side} × {side}, {images:,} pairs",
            "lightly: SimCLRTransform, SimCLRProjectionHead, NTXentLoss",
            ours,
            lightly_simclr(settings, splits["train"], name, arguments, (mean, std), side),
            reach=1,
        )
    return [result]


def lightly_simclr(
    settings: Any, split: Any, name: str, arguments: Any, scale: Any, side: int
) -> Callable[[], None]:
    """SimCLR as lightly's examples write it, with our strengths of augmentation."""
    import timm
    import torch
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torch.utils.data import DataLoader, Dataset

    device = "cuda" if torch.cuda.is_available() else "cpu"
    jitter = settings.colour_jitter
    transform = SimCLRTransform(
        side, cj_prob=settings.jitter_probability, cj_bright=jitter, cj_contrast=jitter, cj_sat=jitter,
        cj_hue=jitter / 4, min_scale=settings.crop_min_area, hf_prob=settings.flip_probability,
        random_gray_scale=settings.grey_probability, gaussian_blur=settings.blur_probability,
        normalize={"mean": list(scale[0]), "std": list(scale[1])},
    )  # fmt: skip
    images = [split.image(row) for row in range(len(split))]

    class Pairs(Dataset[Any]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, row: int) -> Any:
            return transform(images[row])

    def run() -> None:
        torch.manual_seed(0)
        backbone = timm.create_model(name, num_classes=0, **arguments).to(device).train()
        head = SimCLRProjectionHead(
            backbone.num_features, settings.projection_hidden, settings.projection_dim
        ).to(device)
        criterion = NTXentLoss(settings.temperature)
        parameters = [*backbone.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        loader = DataLoader(Pairs(), settings.batch_size, shuffle=True, drop_last=True)
        for _ in range(settings.epochs):
            for first, second in loader:
                loss = criterion(
                    head(backbone(first.to(device))), head(backbone(second.to(device)))
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        loss.item()

    return run


# --------------------------------------------------------------------------- memory


def memory() -> list[Table]:
    """Peak memory of two steps of each trainable part, and of a gradient cache; a process each."""
    from streetvision.models.backbone import build_backbone

    count = sum(p.numel() for p in build_backbone(MEMORY_MODEL, {}).parameters())
    rows = [[part, _alone(_peak_of_part, part)] for part in PARTS]
    what = f"{MEMORY_MODEL} ({count / 1e6:.1f} M parameters), FP32"
    chunked = [[f"{chunks}", _alone(_peak_of_cache, chunks)] for chunks in (1, 4)]
    return [
        Table(
            f"Peak memory of training beyond the loaded model, {what}, batches of 8",
            ["trainable part", "peak"],
            rows,
        ),
        Table(
            f"The same of SimCLR with a gradient cache, {what}, batches of 16 pairs",
            ["gradient_cache_chunks", "peak"],
            chunked,
        ),
    ]


def _alone(measure: Callable[[Any], int], argument: Any) -> str:
    """Peak as text, measured in a process of its own, which gives back what it frees.

    Otherwise glibc's heap, and not what training needs, decides where tensors of a few MB come and go.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak = pool.submit(measure, argument).result()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return f"{peak / 2**20:,.0f} MiB"


def _peak_of_part(part: str) -> int:
    from streetvision.core.params import Train

    settings = Train(
        backbone=MEMORY_MODEL, height_px=224, width_px=224, trainable=part, epochs=1,
        precision="fp32", init_from_explora=False, choose_epoch="last", batch_size=8,
    )  # fmt: skip
    with bench_splits(16, 224, 224) as (splits, folder):
        return _peak(lambda: fit(settings, splits, folder))


def _peak_of_cache(chunks: int) -> int:
    from streetvision.core.params import Compile, Explora, Hardware
    from streetvision.data.transforms import Preprocessing
    from streetvision.explora.pretraining import adapt_backbone
    from streetvision.models.backbone import build_backbone, resolve

    settings = Explora(
        enabled=True, epochs=1, batch_size=16, gradient_cache_chunks=chunks, precision="fp32"
    )
    name, arguments, mean, std = resolve(MEMORY_MODEL, 224, 224)
    preprocessing = Preprocessing(224, 224, "crop", mean, std)
    backbone = build_backbone(name, arguments)
    with bench_splits(32, 224, 224, "explora") as (splits, folder):
        return _peak(
            lambda: adapt_backbone(
                backbone, settings, splits["train"], splits["val_select"], preprocessing,
                pretrained=False, freeze_norm=False, seed=0, scratch=folder / "scratch",
                hardware=Hardware(), compile_settings=Compile(),
            )
        )  # fmt: skip


def _peak(work: Callable[[], object]) -> int:
    """Bytes that `work` needs at most beyond what is there now."""
    import lightning.pytorch  # noqa: F401  (libraries count as there)
    import torch

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
    work()
    after = torch.cuda.max_memory_allocated() if gpu else _status("VmHWM")
    return int(after - before)


def _status(name: str) -> int:
    """Bytes of one line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
