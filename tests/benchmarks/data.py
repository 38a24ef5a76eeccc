"""Images on their way: large photographs to splits, splits to training inputs, inputs as challenges."""

from __future__ import annotations

import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageChops

from streetvision.core.params import Data
from streetvision.core.processes import in_processes
from streetvision.core.schema import SPLITS
from streetvision.prepare.prepare import prepare_splits
from streetvision.sources.ingest import write_shard
from streetvision.subnet.profiles import CROP
from streetvision.subnet.served import Task, challenge_rng, served_jpegs
from tests.benchmarks.runner import Result, Table, compare

PHOTOS, PHOTO_SIZE = 48, (4032, 3024)
SIDE = 512  # pixels that photographs are prepared for
SMALL_COUNTS = (1000, 4000, 16_000)
# Shorter sides of stored images and of the inputs that they are decoded for each time.
DECODED = ((96, 96), (224, 224), (256, 224))
INPUTS = 192
CHALLENGED = {96: 48, 256: 24}  # shorter side of images → how many


# --------------------------------------------------------------------------- images


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth random colours with texture in them, at a size of at least 64 × 48 pixels."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    base = Image.fromarray(patches).resize((252, 189), Image.Resampling.BICUBIC)
    pixels = np.asarray(base) + rng.integers(-30, 31, (189, 252, 3))
    base = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return base.resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> bytes:
    """As a camera stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@lru_cache(1)
def _sensor_noise() -> Image.Image:
    noise = np.random.default_rng(0).normal(16, 2.4, (PHOTO_SIZE[1], PHOTO_SIZE[0]))
    grey = Image.fromarray(np.clip(noise, 0, 32).astype(np.uint8))
    return Image.merge("RGB", [grey] * 3)


def photograph(seed: int) -> bytes:
    """A JPEG of 12 megapixels and about 1.3 MB: texture, and the noise of a sensor."""
    noisy = ImageChops.add(picture(seed, PHOTO_SIZE), _sensor_noise(), offset=-16)
    return jpeg(noisy, 80)


def small_photograph(seed: int) -> bytes:
    """A JPEG of 64 × 48 pixels."""
    return jpeg(picture(seed, (64, 48)), 90)


class _Raw:
    """Rows of a raw shard: groups of two images, one of each class."""

    def __init__(self, images: list[bytes], first: int) -> None:
        self.images = images
        self.first = first
        self.n_rows = len(images)

    def read(self) -> Iterator[dict[str, Any]]:
        for row, image in enumerate(self.images, self.first):
            yield {
                "id": f"image-{row:06d}", "image": {"bytes": image, "path": None}, "label": row % 2,
                "source": "noise", "group": f"group-{row // 2:06d}",
            }  # fmt: skip


def write_raw(folder: Path, images: list[bytes]) -> Path:
    """Raw shards of 1,000 rows, as `ingest` writes them."""
    folder.mkdir()
    for start in range(0, len(images), 1000):
        part = _Raw(images[start : start + 1000], start)
        write_shard(part, folder / f"noise-{start:06d}.parquet")
    return folder


# --------------------------------------------------------------------------- prepare


def prepare_stage(raw: Path, folder: Path, data: Data, workers: int) -> None:
    """All that the stage `prepare` does with the images, from its start."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out, scratch = Path(place), Path(place, "scratch")
        scratch.mkdir()
        splits = {name: out / f"{name}.arrow" for name in SPLITS}
        prepare_splits(
            raw, splits, out / "originals.arrow", out / "quarantine.csv", scratch, data, 0, workers
        )


def prepare() -> list[Result]:
    """Photographs of 12 megapixels to split files, against Pillow and against decoding alone."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photos = list(in_processes(photograph, range(PHOTOS), 0))
        raw = write_raw(folder / "raw", photos)
        files = [folder / f"{number}.jpg" for number in range(PHOTOS)]
        for file, photo in zip(files, photos, strict=True):
            file.write_bytes(photo)
        size = sum(map(len, photos)) / PHOTOS / 1e6
        target = (SIDE * PHOTO_SIZE[0] // PHOTO_SIZE[1], SIDE)
        few = files[::8]

        def pillow() -> None:
            for file in few:
                with Image.open(file) as image:
                    small = image.convert("RGB").resize(target, Image.Resampling.BICUBIC)
                small.save(folder / "small.jpg", quality=92)

        def bare() -> None:
            for file in files:
                with Image.open(file) as image:
                    image.draft("RGB", target)
                    image.load()

        ours = partial(prepare_stage, raw, folder, Data(side_px=SIDE), 1)
        what = (
            f"prepare, {PHOTOS} JPEGs of 12 megapixels and {size:.1f} MB to {SIDE} px, one process"
        )
        return [
            compare(
                what,
                "Pillow: full decode, bicubic, save (extrapolated from an eighth)",
                ours, pillow, PHOTOS / len(few), reach=5,
            ),
            compare(
                what, "decoding at DCT scale alone (libjpeg-turbo)", ours, bare, reach=1 / 1.6
            ),
        ]  # fmt: skip


def prepare_memory() -> list[Table]:
    """Peak memory and time of `prepare` as images become more; a process of its own for each number."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        images = list(in_processes(small_photograph, range(max(SMALL_COUNTS)), 0))
        for count in SMALL_COUNTS:
            raw = write_raw(Path(place, f"raw-{count}"), images[:count])
            code = f"from tests.benchmarks.data import prepare_cost; prepare_cost({str(raw)!r})"
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            seconds, own, worker = json.loads(done.stdout)
            rows.append(
                [
                    f"{count:,}", f"{seconds:.2f} s", f"{1000 * seconds / count:.2f} ms",
                    f"{own:.0f} MiB", f"{worker:.0f} MiB",
                ]
            )  # fmt: skip
    return [
        Table(
            "`prepare` of JPEGs of 64 × 48 pixels, two workers (reach: memory within ± 10 %)",
            ["images", "time", "per image", "peak memory", "of the largest worker"],
            rows,
        )
    ]


def prepare_cost(raw: str) -> None:
    """Print seconds, and MiB at the peak of this process and of its largest worker; Linux only."""
    peaks = [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            workers = [str(child.pid) for child in multiprocessing.active_children()]
            peaks.extend(_peak(worker) for worker in workers)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    prepare_stage(Path(raw), Path(raw).parent, Data(side_px=48), 2)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps([seconds, _peak("self"), max(peaks)]))


def _peak(process: str) -> float:
    """MiB; not from `getrusage`, which counts what the process was before it became this program."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


# --------------------------------------------------------------------------- loading


@contextmanager
def stored_images(count: int, side: int) -> Iterator[Path]:
    """A split file of images of 4:3, and the same JPEGs in folders of their class beside it."""
    from tests.benchmarks.training import write_split

    images = [jpeg(picture(seed, (side * 4 // 3, side)), 92) for seed in range(count)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, image in enumerate(images):
            file = folder / "classes" / str(number % 2) / f"{number:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)
        write_split(folder / "train.arrow", images, side * 4 // 3, side)
        yield folder


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, as in a worker of a DataLoader."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def access() -> list[Result]:
    """Random access, decoding and training transforms, by one worker."""
    results = []
    with one_thread():
        # As by default, the same of data that memory cannot hold, and as in the natix-gpu preset.
        for stored, side, keep in ((96, 96, True), *((*sizes, False) for sizes in DECODED)):
            with training_inputs(stored, side, keep=keep) as (ours, other):
                results.append(
                    compare(
                        f"random access and training transforms, {stored} px to {side}, {INPUTS} images, "
                        + ("kept decoded" if keep else "decoded each time"),
                        "torchvision: ImageFolder, transforms v2",
                        ours, other, reach=1.5,
                    )
                )  # fmt: skip
    return results


@contextmanager
def training_inputs(
    stored: int, side: int, *, keep: bool
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Ours and torchvision: images of `stored` pixels, 4:3, to inputs of `side`, decoded once or each time."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    from streetvision.core.params import Train
    from streetvision.data import loader
    from streetvision.data.store import open_split
    from streetvision.data.transforms import Preprocessing, training_transform

    width = side * 4 // 3
    train = Train(height_px=side, width_px=width, served_probability=0.0)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop((side, width), (train.crop_min_area, 1.0), (1.0, 16 / 9)),
            v2.RandomHorizontalFlip(train.flip_probability),
            v2.ColorJitter(*[train.colour_jitter] * 3),
            v2.PILToTensor(),
        ]
    )
    with stored_images(INPUTS, stored) as folder:
        plain = ImageFolder(folder / "classes", transform)
        preprocessing = Preprocessing(side, width, train.fit, (0.5,) * 3, (0.5,) * 3)
        split = open_split("train", "train", folder / "train.arrow")
        with patch.object(loader, "CACHE_BYTES", loader.CACHE_BYTES if keep else 0):
            images = loader.TrainingImages(split, preprocessing, training_transform(train), 0)
        order = np.random.default_rng(0).permutation(INPUTS).tolist()

        def ours() -> None:
            for row in order:
                images[0, row, 0]

        def other() -> None:
            for row in order:
                plain[row]

        yield ours, other


# --------------------------------------------------------------------------- challenges


def challenge_tasks(side: int) -> list[Task]:
    """JPEGs of `side` pixels and 4:3."""
    return [
        Task(f"image-{n}", jpeg(picture(n, (side * 4 // 3, side)), 92))
        for n in range(CHALLENGED[side])
    ]


def all_levels(tasks: Sequence[Task]) -> list[bytes]:
    """A challenge of each image at each level."""
    return list(served_jpegs(CROP, tasks, CROP.levels, 1, 0))


def distort() -> list[Result]:
    """All four levels of challenges, JPEG in and out, against torchvision with the same draws."""
    results = []
    with one_thread():
        for side in CHALLENGED:
            tasks = challenge_tasks(side)
            results.append(
                compare(
                    f"{4 * len(tasks)} challenges of images of {side} px, all levels, one thread",
                    "torchvision on float tensors, as the validator, same draws",
                    partial(all_levels, tasks),
                    lambda tasks=tasks: [
                        _plain_challenge(task, n) for task in tasks for n in CROP.levels
                    ],
                    reach=3,
                )
            )
    return results


def _plain_challenge(task: Task, level: int) -> bytes:
    """One challenge, a step after the other in RGB or, as the validator, in YCbCr."""
    import torch
    from torchvision.transforms.v2 import functional

    from streetvision.subnet import distortions as ours

    to_ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    source = Image.open(io.BytesIO(task.data)).convert("RGB")
    drawn = ours.draw_crop(level, source.size, challenge_rng(0, task.id, level))
    image = functional.to_dtype(functional.to_image(source), torch.float32, scale=True)
    image = functional.rotate(image, drawn.angle)
    left, top, side = drawn.crop
    image = functional.resized_crop(image, top, left, side, side, [ours.SIDE] * 2, antialias=True)

    def in_ycc(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ycc = change(torch.einsum("ij,jhw->ihw", to_ycc, image))
        return torch.einsum("ij,jhw->ihw", torch.linalg.inv(to_ycc), ycc).clamp(0, 1)

    if drawn.saturation:
        factor = torch.tensor([1.0] + [ours.SATURATION[drawn.saturation - 1]] * 2)
        image = in_ycc(lambda ycc: ycc * factor[:, None, None])
    if drawn.contrast:
        image = image * ours.CONTRAST[drawn.contrast - 1]
    if drawn.resampling:
        small = ours.SIDE // ours.RESAMPLING[drawn.resampling - 1]
        for size in (small, ours.SIDE):
            image = functional.resize(image, [size, size], antialias=False)
    if drawn.noise:
        deviation = ours.NOISE[drawn.noise - 1] ** 0.5
        image = in_ycc(lambda ycc: ycc + deviation * torch.randn_like(ycc))
    if drawn.blur:
        kernel = ours.BLUR[drawn.blur - 1]
        image = functional.gaussian_blur(image, [kernel, kernel], [kernel / 6] * 2)
    return jpeg(functional.to_pil_image(functional.to_dtype(image, torch.uint8, scale=True)), 75)
