"""The benchmarks; each returns one `Result`."""

from __future__ import annotations

import io

import numpy as np

from tests.benchmarks.runner import Result, compare
from tests.benchmarks.training import explora, train


def sweep() -> Result:
    """Exact optimum over a million scores against scikit-learn over 5,000 thresholds."""
    from sklearn.metrics import matthews_corrcoef

    from streetvision.decision.threshold import select_threshold_max_mcc

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1_000_000)
    logits = rng.normal(2 * labels - 1, 1.5)
    few = np.linspace(0.3, 0.7, 2)

    def other() -> None:
        probabilities = 1 / (1 + np.exp(-logits))
        for threshold in few:
            matthews_corrcoef(labels, probabilities > threshold)

    return compare(
        "exact MCC sweep, 1,000,000 scores",
        f"scikit-learn over 5,000 thresholds (extrapolated from {len(few)})",
        lambda: select_threshold_max_mcc(logits, labels),
        other,
        5000 / len(few),
    )


def bootstrap() -> Result:
    """All interval metrics over groups against scikit-learn in a loop."""
    from sklearn import metrics

    from streetvision.evaluation.bootstrap import group_intervals

    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 100)
    labels = rng.integers(0, 2, 10_000)
    probabilities = 1 / (1 + np.exp(-rng.normal(2 * labels - 1, 1.5)))
    rows = [np.flatnonzero(groups == group) for group in range(100)]
    few, resamples = 3, 2000

    def other() -> None:
        for _ in range(few):
            index = np.concatenate([rows[g] for g in rng.integers(0, 100, 100)])
            y, p = labels[index], probabilities[index]
            metrics.accuracy_score(y, p > 0.5)
            metrics.precision_recall_fscore_support(y, p > 0.5, average="binary")
            metrics.matthews_corrcoef(y, p > 0.5)
            metrics.roc_auc_score(y, p)
            metrics.average_precision_score(y, p)
            metrics.brier_score_loss(y, p)
            metrics.log_loss(y, p)

    return compare(
        "group bootstrap of 14 metrics, 10,000 images, 2,000 resamples",
        f"scikit-learn in a loop, 9 of the metrics (extrapolated from {few} resamples)",
        lambda: group_intervals(labels, probabilities, groups, 0.5, resamples),
        other,
        resamples / few,
    )


def decode() -> Result:
    """A 12-megapixel JPEG to 512 pixels against Pillow's full decode."""
    from PIL import Image

    from streetvision.data.decode import decode_image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (378, 504, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize((4032, 3024), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=85)
    data = buffer.getvalue()

    def other() -> None:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.resize((683, 512), Image.Resampling.BICUBIC)

    return compare(
        f"12-megapixel JPEG ({len(data) / 1e6:.1f} MB) to 512 px, one thread",
        "Pillow full decode + bicubic",
        lambda: decode_image(data, side_px=512, square_crop=False, max_pixels=10**8),
        other,
    )


def distort() -> Result:
    """The hardest distortion of a photograph of 1,024 × 768 pixels against torchvision on tensors."""
    import torch
    from PIL import Image
    from torchvision.transforms.v2 import functional

    from streetvision.data.distort import SIDE, Distortion, apply

    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize((1024, 768), Image.Resampling.BICUBIC)
    drawn = Distortion(12.0, (100, 50, 600), False, False, 2, 2, 2, 2, 2)

    def other() -> None:
        image = functional.to_dtype(functional.to_image(photo), torch.float32, scale=True)
        image = functional.rotate(image, drawn.angle)
        image = functional.resized_crop(image, 50, 100, 600, 600, [SIDE, SIDE], antialias=True)
        image = functional.adjust_brightness(functional.adjust_saturation(image, 0.3), 0.725)
        for side in (SIDE // 3, SIDE):
            image = functional.resize(image, [side, side], antialias=False)
        image = functional.gaussian_noise(image, sigma=0.045)
        image = functional.gaussian_blur(image, [9, 9], [1.5, 1.5])
        functional.to_pil_image(image)

    return compare(
        "one distortion of level 3, 1,024 × 768 px, one thread",
        "torchvision on a float tensor, as a validator",
        lambda: apply(photo, drawn, rng),
        other,
    )


CASES = {
    "sweep": sweep, "bootstrap": bootstrap, "decode": decode, "distort": distort, "train": train,
    "explora": explora,
}  # fmt: skip
