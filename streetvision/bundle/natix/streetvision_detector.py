# Written by `python -m streetvision natix install`; run that again to change it.
"""StreetVision's detector for Bittensor Subnet 72: image in, probability of roadwork out.

This file is complete: it needs torch, timm (which brings safetensors), numpy, Pillow and the bundle, nothing
of StreetVision, and works on Python 3.10. It gives the probabilities of `streetvision.bundle.Predictor`, one
image at a time; that project's tests hold both equal.

`base_miner/detectors/configs/StreetVision.yaml` names the weights; all else is in `bundle.json` beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from base_miner.detectors import FeatureDetector
from base_miner.registry import DETECTOR_REGISTRY
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

MAX_PIXELS = 50_000_000  # a challenge has 50,000; without a limit a small file can fill the memory
Floats = NDArray[np.float64]
State = dict[str, Tensor]
PixelBox = tuple[int, int, int, int]
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@DETECTOR_REGISTRY.register_module(module_name="StreetVision")
class StreetVisionDetector(FeatureDetector):
    """The classifier of a bundle, the fusion of its views, and its policy."""

    def __init__(
        self,
        model_name: str = "StreetVision",
        config_name: str = "StreetVision.yaml",
        device: str = "cpu",
    ) -> None:
        super().__init__(model_name, config_name, device)

    def load_model(self) -> None:
        """Load the bundle around `weights`, a path that the YAML gives; the base class calls this."""
        folder = (Path(__file__).resolve().parent / "weights" / self.weights).parent
        bundle = read_bundle(folder)
        files: dict[str, str] = bundle["files"]
        self.preprocessing = bundle["classifier"]["preprocessing"]
        self.views = bundle["views"]
        policy = read_file(folder, bundle["policy"]["policy_path"], files)
        self.policy = json.loads(policy)["scrc_params"]
        # Tensors first, then the model that takes them: twice the weights at most are in memory.
        state = load(read_file(folder, bundle["model_checkpoint"], files))
        self.model = Classifier(bundle["classifier"])
        self.model.load_state_dict(state)
        del state
        self.model.eval().to(self.device).to(memory_format=torch.channels_last)
        self.networks: list[Network] = []
        if bundle["cvfm_weights"] is not None:
            state = load(read_file(folder, bundle["cvfm_weights"], files))
            heads = int(self.views["options"].get("attention_heads", 1))
            self.networks = networks(state, heads, self.model.head)

    def __call__(self, image: Image.Image) -> float:
        """Return the probability in [0, 1] that the image shows roadwork; ValueError if it is too large."""
        return deployed_probability(self.policy, self.logit(upright_rgb(image)))

    @torch.inference_mode()
    def logit(self, image: Image.Image) -> float:
        """Return the logit that the policy takes, of an upright RGB image."""
        grid, hard = self.views["grid"], self.policy.get("hard_images")
        if hard is not None and (grid["grid"] > 1 or grid["flip"]):
            inputs, _, _ = cut_views(image, self.preprocessing, {"grid": 1, "flip": False})
            first = float(self.score(inputs)[0][0])
            if not hard["low"] < first < hard["high"]:
                return first
        inputs, content, boxes = cut_views(image, self.preprocessing, grid)
        logits, features = self.score(inputs)
        mode = self.views["mode"]
        if not self.networks:
            return fuse_by_rule(mode, self.views["options"], logits.numpy(), content, boxes)
        fused = [getattr(network, mode)(logits, features, boxes) for network in self.networks]
        return float(sum(fused) / len(fused))

    def score(self, inputs: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Return logits [V] and features [V, D], in float64 on the CPU, of inputs [V, H, W, 3]."""
        images = torch.from_numpy(inputs).to(self.device).permute(0, 3, 1, 2)
        mean, std = (
            torch.tensor(self.preprocessing[name], device=self.device).view(1, 3, 1, 1) * 255
            for name in ("mean", "std")
        )
        images = ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
        logits, features = self.model(images)
        # Fusion is fitted on features in float16.
        return logits.cpu().double(), features.cpu().half().double()


def read_bundle(folder: Path) -> dict[str, Any]:
    """Return `bundle.json` after checking it by its own SHA-256."""
    path = folder / "bundle.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: run `python -m streetvision natix install` again"
        )
    document: dict[str, Any] = json.loads(path.read_bytes())
    content = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    check_hash(path, text.encode(), document["sha256"])
    return document


def read_file(folder: Path, name: str, files: dict[str, str]) -> bytes:
    """Return the bytes of a file of the bundle, read once: what was hashed is what is used."""
    data = (folder / name).read_bytes()
    check_hash(folder / name, data, files[name])
    return data


def check_hash(path: Path, data: bytes, expected: str) -> None:
    """ValueError unless the data of a file have that SHA-256."""
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"{path} was changed (SHA-256 differs): run `natix install` again")


class Classifier(nn.Module):
    """Backbone and head of one logit, with the names that the weights have."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        name = config["backbone"]
        if not timm.is_model(name.split(".")[0]):
            raise ValueError(f"timm {timm.__version__} has no model {name}: a newer timm is needed")
        arguments = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config["arguments"].items()
        }
        self.backbone = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        width, hidden = self.backbone.head_hidden_size, config.get("head_hidden")
        self.hidden: nn.Module = nn.Identity()
        if hidden is not None:
            self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.head = nn.Linear(width if hidden is None else hidden, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [V] and features [V, D] of images [V, 3, H, W]."""
        features = self.backbone(images)
        return self.head(self.hidden(features)).squeeze(1), features


# --------------------------------------------------------------------------- image to model inputs


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image upright and in RGB: transparency on black, 16-bit grey by its high byte."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are too many; {MAX_PIXELS:,} are allowed"
        )
    image.load()  # a PNG may have its EXIF block behind the pixels
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block is no reason not to answer
        orientation = 1
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("RGB")
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def cut_views(
    image: Image.Image, fit: dict[str, Any], grid: dict[str, Any]
) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Return the views' inputs [V, H, W, 3], pixels of each that show the image [V], and boxes [V, 4].

    The global view comes first; tiles are cut from the image itself, then fitted to the input like it.
    """
    frame = (0, 0, image.width, image.height)
    if fit["square_crop"]:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        frame = (left, top, left + side, top + side)
    pixel_boxes, n = [frame], grid["grid"]
    if n > 1:
        for row, column in product(range(n), repeat=2):
            across = span(column, n, grid["growth"], frame[2] - frame[0])
            down = span(row, n, grid["growth"], frame[3] - frame[1])
            pixel_boxes.append(
                (frame[0] + across[0], frame[1] + down[0], frame[0] + across[1], frame[1] + down[1])
            )
    fitted = [fit_to_input(image.crop(box), fit) for box in pixel_boxes]
    inputs = np.stack([one for one, _ in fitted])
    content = np.array([pixels for _, pixels in fitted], dtype=np.float64)
    boxes = np.stack([visible(box, fit) for box in pixel_boxes]) / np.tile(image.size, 2)
    if grid["flip"]:
        inputs = np.concatenate([inputs, inputs[:, :, ::-1]])
        content, boxes = np.tile(content, 2), np.tile(boxes, (2, 1))
    return inputs, content, boxes


def span(index: int, n: int, growth: float, length: int) -> tuple[int, int]:
    """Return first and last + 1 pixel of a cell grown by `growth` of its length, inside [0, length]."""
    start = max(0, round((index - growth / 2) / n * length))
    stop = min(length, round((index + 1 + growth / 2) / n * length))
    start = min(start, length - 1)
    return start, max(stop, start + 1)


def fit_to_input(image: Image.Image, fit: dict[str, Any]) -> tuple[NDArray[np.uint8], int]:
    """Return the model input [H, W, 3] before normalisation and how many pixels of it show the image."""
    wanted = (fit["width"], fit["height"])
    everything = wanted[0] * wanted[1]
    if image.size == wanted:
        return np.asarray(image), everything
    ratios = (wanted[0] / image.width, wanted[1] / image.height)
    scale = min(ratios) if fit["fit"] == "letterbox" else max(ratios)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if image.size == wanted:
        return np.asarray(image), everything
    if fit["fit"] == "crop":
        left, top = (size[0] - wanted[0]) // 2, (size[1] - wanted[1]) // 2
        return np.asarray(image.crop((left, top, left + wanted[0], top + wanted[1]))), everything
    canvas = Image.new("RGB", wanted, tuple(round(255 * value) for value in fit["mean"]))
    canvas.paste(image, ((wanted[0] - size[0]) // 2, (wanted[1] - size[1]) // 2))
    return np.asarray(canvas), size[0] * size[1]


def visible(box: PixelBox, fit: dict[str, Any]) -> Floats:
    """Return what the input shows of a box, in pixels: `crop` cuts what sticks out."""
    edges = np.array(box, dtype=np.float64)
    if fit["fit"] == "letterbox":
        return edges
    size = edges[2:] - edges[:2]
    scale = max(fit["width"] / size[0], fit["height"] / size[1])
    cut = np.maximum(size - np.array([fit["width"], fit["height"]]) / scale, 0) / 2
    shown: Floats = edges + np.concatenate([cut, -cut])
    return shown


# --------------------------------------------------------------------------- views to one logit


def is_tile(boxes: Floats) -> NDArray[np.bool_]:
    """Return which views [V] show another part of the image than the global one."""
    different: NDArray[np.bool_] = (np.abs(boxes - boxes[0]) > 1e-9).any(axis=1)
    return different


def fuse_by_rule(
    mode: str, options: dict[str, float], logits: Floats, content: Floats, boxes: Floats
) -> float:
    """Return the logit of views [V] by a rule that is not trained."""
    if mode == "single":
        return float(logits[0])
    if mode == "simple_mean":
        return float(logits.mean())
    if mode == "content_aware":
        return float(np.average(logits, weights=content))
    if mode == "weighted_uncertainty":  # by the inverse entropy of the views' probabilities
        z = np.abs(logits) / options["temperature"]
        entropy = np.log1p(np.exp(-z)) + z * np.exp(-z) / (1 + np.exp(-z))
        return float(np.average(logits, weights=1 / (0.05 + entropy)))
    if mode == "topk_mean":
        tiles = is_tile(boxes)
        top = np.sort(logits[tiles])[::-1][: int(options["top_k"])]
        return float((logits[~tiles].mean() + top.sum()) / (1 + len(top)))
    raise ValueError(f"the fusion mode {mode} is unknown: run `natix install` again")


def networks(state: State, heads: int, head: nn.Linear) -> list[Network]:
    """Return the trained networks whose logits are averaged; the weights of a single one have no prefix."""
    if not any(name.startswith("members.") for name in state):
        return [Network(state, heads, head)]
    parts: dict[int, State] = {}
    for name, value in state.items():
        _, number, rest = name.split(".", 2)
        parts.setdefault(int(number), {})[rest] = value
    return [Network(part, heads, head) for _, part in sorted(parts.items())]


class Network:
    """One trained fusion of the views of one image, in float64 on the CPU.

    Methods take logits [V], features [V, D] and boxes [V, 4]; all views exist.
    """

    def __init__(self, state: State, heads: int, head: nn.Linear) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.heads = heads
        self.head = head

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply a linear layer."""
        return functional.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """Standardise features as in training."""
        return (x - self.state[f"{name}.mean"]) / self.state[f"{name}.deviation"]

    def terms(self, logits: Tensor, tiles: Tensor) -> Tensor:
        """Return the global logit, the mean tile's and the mean of the top three tiles', standardised."""
        whole = logits[~tiles].mean()
        terms = [whole, whole, whole]
        if tiles.any():
            ordered = logits[tiles].sort(descending=True).values
            terms = [whole, ordered.mean(), ordered[:3].mean()]
        return self.scaled("scale_terms", torch.stack(terms))

    def mlp(self, logits: Tensor, features: Tensor, boxes: Floats) -> Tensor:
        """Global and mean tile features and the logits, through linear layers."""
        tiles = torch.from_numpy(is_tile(boxes))
        tile = torch.zeros_like(features[0])
        if tiles.any():
            tile = self.scaled("scale_tiles", features[tiles].mean(0))
        whole = self.scaled("scale_global", features[~tiles].mean(0))
        x = torch.cat([whole, tile, self.terms(logits, tiles)])
        layer = 0
        while f"hidden.{layer}.weight" in self.state:
            x = functional.gelu(self.linear(f"hidden.{layer}", x))
            layer += 2
        return self.linear("output", x)

    def latent(self, logits: Tensor, features: Tensor, boxes: Floats) -> Tensor:
        """Views averaged in a latent space and decoded to features that the classifier's head takes."""
        state = self.state
        encoded = self.linear("encoder", self.scaled("scale", features))
        encoded = encoded + self.linear("outer", functional.gelu(self.linear("inner", encoded)))
        weights = state["view_logits"].softmax(0)
        biases = torch.stack([state[f"biases.{view}"] for view in range(len(weights))])
        decoded = torch.einsum("vdl,l->vd", state["decoders"], weights @ encoded) + biases
        fused = (weights @ decoded) * state["scale.deviation"] + state["scale.mean"]
        head = self.head
        return functional.linear(fused, head.weight.cpu().double(), head.bias.cpu().double())

    def attention(self, logits: Tensor, features: Tensor, boxes: Floats) -> Tensor:
        """Views attend to each other with a bias by their places; global and mean tile to the logit."""
        tiles, place = torch.from_numpy(is_tile(boxes)), places(boxes)
        tokens = self.linear("token", self.scaled("scale", features)) + self.linear("place", place)
        count, dim = tokens.shape
        split = self.linear("query_key_value", tokens).view(count, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(1, 2, 0, 3)  # each [heads, V, dim / heads]
        apart = place[None] - place[:, None]  # key minus query
        bias = self.linear("bias", torch.cat([apart, apart[..., :2].square()], dim=2))
        scores = query @ key.transpose(1, 2) / math.sqrt(dim // self.heads) + bias.permute(2, 0, 1)
        mixed = (scores.softmax(2) @ value).transpose(0, 1).reshape(count, dim)
        tokens = tokens + self.linear("mixed", mixed)
        tile = tokens[tiles].mean(0) if tiles.any() else torch.zeros_like(tokens[0])
        return self.linear(
            "output", torch.cat([tokens[~tiles].mean(0), tile, self.terms(logits, tiles)])
        )


def places(boxes: Floats) -> Tensor:
    """Return centre x and y, log width and height of views in units of the global one [V, 4]."""
    corner, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    centre = (corner + size / 2 - corner[0]) / size[0]
    return torch.from_numpy(np.concatenate([centre, np.log(size / size[0])], axis=1))


# --------------------------------------------------------------------------- logit to probability


def deployed_probability(policy: dict[str, Any], logit: float) -> float:
    """Calibrate, move to the served prior and by the threshold's shift: 0.5 is the decision."""
    shift = log_odds(policy["served_prior"]) - log_odds(policy["calibration_prior"])
    z = calibrated(policy["calibrator"], logit) + shift + policy["threshold_shift"]
    return float(1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z)))


def log_odds(probability: float) -> float:
    """Return ln p / (1 - p)."""
    return math.log(probability) - math.log1p(-probability)


def calibrated(fitted: dict[str, Any], x: float) -> float:
    """Return the log-odds that a fitted calibrator gives a logit."""
    return float(CALIBRATORS[fitted["kind"]](fitted, x))


def platt(fitted: dict[str, Any], x: float) -> float:
    """Return slope times logit plus intercept."""
    return float(fitted["slope"] * x + fitted["intercept"])


def temperature(fitted: dict[str, Any], x: float) -> float:
    """Return logit over temperature."""
    return float(x / fitted["temperature"])


def beta(fitted: dict[str, Any], x: float) -> float:
    """Return a ln p - b ln(1 - p) + c."""
    a, b = fitted["a"], fitted["b"]
    even = -abs(x) - 2 * math.log1p(math.exp(-abs(x)))  # ln p + ln(1 - p)
    return float((a + b) / 2 * x + (a - b) / 2 * even + fitted["c"])


def quadratic(fitted: dict[str, Any], x: float) -> float:
    """Return a parabola's value, continued by its tangents."""
    low, high = fitted["low"], fitted["high"]
    inside = min(max(x, low), high) - low
    right = inside**2 / (2 * (high - low))
    first, second = inside - right + min(x - low, 0.0), right + max(x - high, 0.0)
    return float(fitted["slope_low"] * first + fitted["slope_high"] * second + fitted["intercept"])


def pchip(fitted: dict[str, Any], x: float) -> float:
    """Return a cubic Hermite spline's value, continued by its tangents."""
    knots, heights, slopes = fitted["knots"], fitted["log_odds"], fitted["slopes"]
    if x <= knots[0]:
        return float(heights[0] + slopes[0] * (x - knots[0]))
    if x >= knots[-1]:
        return float(heights[-1] + slopes[-1] * (x - knots[-1]))
    i = int(np.searchsorted(knots, x, side="right")) - 1
    width, t = knots[i + 1] - knots[i], x - knots[i]
    secant = (heights[i + 1] - heights[i]) / width
    bend = (slopes[i] + slopes[i + 1] - 2 * secant) / width
    return float(
        heights[i] + t * (slopes[i] + t * ((secant - slopes[i]) / width - bend + t * bend / width))
    )


def ensemble(fitted: dict[str, Any], x: float) -> float:
    """Return the log-odds of the members' weighted mean probability, and the intercept."""
    z = np.array([calibrated(member, x) for member in fitted["members"]])
    share = np.log(fitted["weights"])
    positive = np.logaddexp.reduce(share - np.logaddexp(0.0, -z))
    negative = np.logaddexp.reduce(share - np.logaddexp(0.0, z))
    return float(positive - negative + fitted["intercept"])


CALIBRATORS = {
    one.__name__: one for one in (platt, temperature, beta, quadratic, pchip, ensemble)
}  # fmt: skip
