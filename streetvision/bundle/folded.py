"""A bundle folded into one model that stock `transformers` opens, as the subnet's own detector does.

The folder is written beside its place, opened by the transformers that is installed, and compared with the
bundle; only then does it get its name.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streetvision.bundle.archive import bundle_folder
from streetvision.bundle.validate import load_bundle
from streetvision.core.artifacts import (
    ArtifactSchema,
    read_json,
    sha256_file,
    write_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError
from streetvision.data.embeddings import read_embeddings

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.bundle.affine import Affine
    from streetvision.bundle.hf_format import HfModel
    from streetvision.bundle.validate import Bundle
    from streetvision.data.transforms import Preprocessing

RECORD = "streetvision_fold.json"
# What a challenge is: a square of so many pixels.
CHALLENGE_PX = 224
# Largest difference of the two models' log-odds on the same input.
LOGIT_TOLERANCE = 1e-4
# Largest difference of the inputs made of a challenge, in grey levels of 255: newer processors resize in
# other arithmetic than Pillow and may round otherwise. Without a resize there is none.
INPUT_TOLERANCE = 2.0
SAME_SIZE_TOLERANCE = 0.01
# Other images whose inputs are compared and reported: width, height.
OTHER_SHAPES = ((640, 480), (480, 640), (1280, 720), (2048, 2048))
CHECKED_IMAGES = 4
SUBNET_TRANSFORMERS = "4.45"


def fold_bundle(
    bundle: Path,
    output: Path,
    *,
    approximate: bool = False,
    embeddings: Path | None = None,
    project: ArtifactSchema | None = None,
) -> dict[str, Any]:
    """Write a bundle as a transformers image-classification model with the labels None and Roadwork.

    Parameters
    ----------
    bundle
        A bundle folder or `bundle.tar.gz` with one view and a linear head.
    output
        The new folder; an earlier fold there is replaced.
    approximate
        Take the nearest affine rule where the policy is not affine in the logit (`affine.nearest_affine`).
    embeddings
        Of VAL_CALIB: what that rule is nearest over, and its cost measured on.
    project
        Whose VAL_CALIB embeddings are taken if none are given and the bundle's classifier made these;
        without any the rule is nearest over `affine.reference_logits`.

    Returns
    -------
    Content of `streetvision_fold.json`: `bundle_sha256`, `kind`, `needs_transformers`, `architecture`, `slope`,
    `intercept`, `calibrator`, `approximation` (None where exact), `checked` (with which transformers; largest
    difference of the log-odds; of the inputs of a challenge and of other shapes, in grey levels),
    `other_shapes` in words, `files` with their SHA-256.

    Raises
    ------
    UserError
        The bundle cannot be folded, with what to set instead; `output` holds something else; transformers
        is missing or too old; or what it opens is not what the bundle computes.
    """
    from streetvision.bundle.hf_format import hf_model

    with bundle_folder(bundle) as folder:
        parts = load_bundle(folder)
    _check_foldable(parts, bundle)
    affine, cost = _affine(parts, approximate, embeddings, project)
    made = hf_model(parts.model, parts.config, affine)
    record: dict[str, Any] = {
        "bundle_sha256": parts.document["sha256"],
        "kind": made.kind,
        "needs_transformers": made.needs,
        "architecture": parts.config.backbone.split(".")[0],
        "slope": affine.slope,
        "intercept": affine.intercept,
        "calibrator": parts.policy.calibrator.kind,
        "approximation": cost,
        "other_shapes": made.other_shapes,
    }
    with _replacing(output) as temporary:
        _write(made, temporary)
        record["checked"] = _check(parts, affine, made, temporary)
        record["files"] = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        write_json_atomic(temporary / RECORD, record)
    return record


def _check_foldable(parts: Bundle, bundle: Path) -> None:
    wrong = []
    if parts.fusion.n_views > 1 or parts.fusion.network is not None:
        config = parts.fusion.config
        wrong.append(f"it fuses {parts.fusion.n_views} views ({config.mode}): set cvfm.mode single")
    if parts.policy.hard_images is not None:
        wrong.append("hard images get a second pass: set decision.hard_image_views none")
    if parts.config.head_hidden is not None:
        wrong.append("its head has a hidden layer: set train.head linear")
    if wrong:
        raise UserError(f"{bundle} is no single pass of one model; {'; '.join(wrong)}")


def _affine(
    parts: Bundle, approximate: bool, embeddings: Path | None, project: ArtifactSchema | None
) -> tuple[Affine, dict[str, Any] | None]:
    """The rule to fold, and what it costs; None where it is the policy."""
    from streetvision.bundle.affine import (
        approximation_cost,
        exact_affine,
        nearest_affine,
        reference_logits,
    )

    policy = parts.policy
    exact = exact_affine(policy)
    if exact is not None:
        return exact, None
    if embeddings is None and project is not None:
        embeddings = _own_embeddings(parts, project)
    logits: NDArray[np.float64]
    labels: NDArray[np.int64] | None
    if embeddings is None:
        over, logits, labels = "reference logits", reference_logits(policy), None
    else:
        found = read_embeddings(embeddings)
        over, logits, labels = "logits of VAL_CALIB", found.logits, found.labels
    affine = nearest_affine(policy, logits)
    cost = {"over": over} | approximation_cost(policy, affine, logits, labels)
    if not approximate:
        raise UserError(
            f"the calibrator {policy.calibrator.kind} is not affine in the logit. "
            f"{describe_cost(cost)}. Take it with --approximate, or set decision.calibrator platt"
        )
    return affine, cost


def _own_embeddings(parts: Bundle, project: ArtifactSchema) -> Path | None:
    """The project's VAL_CALIB embeddings under the policy's condition, if the bundle's classifier made them."""
    path, manifest = project.embeddings("val_calib", parts.policy.fit_on), project.manifest("embed")
    if not path.is_file() or not manifest.is_file():
        return None
    weights = parts.document["files"][parts.document["model_checkpoint"]]
    made_of = {each["sha256"] for each in read_json(manifest, "embed")["inputs"]}
    return path if weights in made_of else None


def describe(record: Mapping[str, Any]) -> str:
    """A fold's record in a few lines for whoever runs it."""
    checked, cost, needs = record["checked"], record["approximation"], record["needs_transformers"]
    kind = "its own ViT"
    if record["kind"] == "timm_wrapper":
        kind = f"a timm model; the timm there must know {record['architecture']}, as {checked['timm']} does"
    lines = [f"Needs transformers >= {needs}, which opens it as {kind}."]
    if needs != SUBNET_TRANSFORMERS:
        lines.append(f"The subnet's environment has {SUBNET_TRANSFORMERS}: upgrade it there.")
    if cost is None:
        lines.append(f"The policy ({record['calibrator']} and shifts) is affine: folded exactly.")
    else:
        lines.append(f"{describe_cost(cost)}.")
    side = checked["challenge_input"]["side_px"]
    lines.append(
        f"Checked with transformers {checked['transformers']}: log-odds within "
        f"{checked['largest_logit_difference']:.1g} of the bundle's, the input of a {side} x {side} "
        f"challenge within {checked['challenge_input']['largest']:.1g} of 255 grey levels."
    )
    others = ", ".join(
        f"{shape} {each['mean']:.1f}" for shape, each in checked["other_inputs"].items()
    )
    lines.append(f"Other shapes: {record['other_shapes']}.")
    lines.append(f"Mean difference of the input of such images, in grey levels: {others}.")
    return "\n".join(lines)


def describe_cost(cost: Mapping[str, Any]) -> str:
    """One sentence about an affine approximation, without a full stop."""
    text = (
        f"The nearest affine rule over {cost['n']:,} {cost['over']} changes probabilities by up to "
        f"{cost['largest_change']:.3f} ({cost['mean_change']:.3f} on average) and "
        f"{cost['decisions_changed']} decisions"
    )
    if "mcc_cost" in cost:
        losses = (cost[name]["log_loss"] for name in ("policy", "affine"))
        text += f", costs {cost['mcc_cost']:.4f} of MCC {cost['policy']['mcc']:.4f}, and moves the log loss"
        text += " from {:.4f} to {:.4f}".format(*losses)
    return text


def _write(made: HfModel, folder: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous() for name, value in made.state.items()}
    write_atomic(
        folder / "model.safetensors", lambda path: save_file(state, path, {"format": "pt"})
    )
    write_json_atomic(folder / "config.json", made.config)
    if made.processor is not None:
        write_json_atomic(folder / "preprocessor_config.json", made.processor)


def _check(parts: Bundle, affine: Affine, made: HfModel, folder: Path) -> dict[str, Any]:
    """Open the folder with transformers and compare inputs and log-odds."""
    import timm
    import torch

    version, model, processor = _opened(folder, made.needs)
    fit = parts.config.preprocessing
    images = [probe_image(CHALLENGE_PX, CHALLENGE_PX, seed) for seed in range(CHECKED_IMAGES)]
    differences = [input_difference(processor, fit, image) for image in images]
    largest = max(each["largest"] for each in differences)
    same = (fit.height, fit.width) == (CHALLENGE_PX, CHALLENGE_PX)
    allowed = SAME_SIZE_TOLERANCE if same else INPUT_TOLERANCE
    if largest > allowed:
        raise UserError(
            f"transformers {version} makes another input of a challenge than the bundle: "
            f"{largest:.2f} grey levels apart, {allowed} are allowed"
        )
    batch = torch.from_numpy(np.stack([fit.apply(image) for image in images])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        inputs = fit.normalise(batch)
        two = model(inputs).logits.double().numpy()
        wanted = affine(parts.model(inputs)[0].double().numpy())
    apart = float(np.abs(two[:, 1] - two[:, 0] - wanted).max())
    if not apart <= LOGIT_TOLERANCE:
        raise UserError(
            f"transformers {version} computes other log-odds than the bundle: {apart:.2g} apart, "
            f"{LOGIT_TOLERANCE} is allowed"
        )
    return {
        "transformers": version,
        "timm": timm.__version__,
        "largest_logit_difference": apart,
        "challenge_input": {"side_px": CHALLENGE_PX, "largest": largest},
        "other_inputs": {
            f"{width}x{height}": input_difference(processor, fit, probe_image(width, height, 0))
            for width, height in OTHER_SHAPES
        },
    }


def _opened(folder: Path, needs: str) -> tuple[str, Any, Any]:
    """The version of transformers, and the model and the image processor that it finds in the folder."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            f"fold checks what it writes with transformers: pip install 'transformers>={needs}'"
        ) from error
    version = str(transformers.__version__)
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, needs.split("."))):
        raise UserError(
            f"this model needs transformers >= {needs}, {version} is installed here; "
            f"pip install 'transformers>={needs}'"
        )
    shown, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, use_fast=True
        )
    except Exception as error:  # transformers raises nearly anything
        reason = " ".join(str(error).split())
        raise UserError(f"transformers {version} cannot open the folded model: {reason}") from error
    finally:
        logging.set_verbosity(shown)
        if bars:
            logging.enable_progress_bar()
    return version, model.eval(), processor


def input_difference(processor: Any, fit: Preprocessing, image: Image) -> dict[str, float]:
    """How far a processor's input of an image is from the bundle's: largest and mean, in grey levels of 255."""
    found = processor(images=image, return_tensors="pt")["pixel_values"].double().numpy()[0]
    if found.shape != (3, fit.height, fit.width):
        raise UserError(f"the processor makes an input of shape {found.shape}")
    levels = (found * np.reshape(fit.std, (3, 1, 1)) + np.reshape(fit.mean, (3, 1, 1))) * 255
    apart = np.abs(levels - fit.apply(image).transpose(2, 0, 1))
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


def probe_image(width: int, height: int, seed: int) -> Image:
    """A seeded image with structure of all sizes, as photographs have: noise of 4, 16, … pixels on top."""
    from PIL import Image as PILImage

    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    cell = max(width, height)
    while cell >= 1:
        shape = (max(1, height // cell), max(1, width // cell), 3)
        noise = PILImage.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), PILImage.Resampling.BICUBIC)) - 127.5
        cell //= 4
    spread = (total - total.min()) / np.ptp(total) * 255
    return PILImage.fromarray(spread.round().astype(np.uint8))


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `output` when all went well; of nothing but an earlier fold."""
    free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not free and not (output / RECORD).is_file():
        raise UserError(f"{output} holds no folded model; give a new folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.{secrets.token_hex(6)}")
        temporary.mkdir()  # unlike `mkdtemp` as the umask says
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    try:
        yield temporary
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
