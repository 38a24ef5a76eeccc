"""The parts of a bundle built from their documents and weights, and checked, whoever wrote them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from streetvision.bundle.cost import counted_on_meta
from streetvision.bundle.limits import MAX_OPERATIONS
from streetvision.bundle.validate import views_of_grid
from streetvision.core.errors import UserError
from streetvision.core.params import ViewGrid
from streetvision.data.views import view_names
from streetvision.decision.policy import Policy
from streetvision.fusion.fusion import TRAINED, Fusion, FusionConfig, trained_fusion
from streetvision.models.backbone import ARCHITECTURES
from streetvision.models.classifier import (
    ClassifierConfig,
    RoadworkClassifier,
    filled,
)
from streetvision.models.multiview import score_views

# All that an export writes; timm has more that fetch, read a file or change what is built.
_ARGUMENTS = {"img_size"}.union(*(each.arguments for each in ARCHITECTURES.values()))
_DTYPES = {"float32", "float16", "bfloat16", "int64"}
# What an architecture may build and throw away again while it is built.
SPARE_PARAMETERS = 2**20
# Of the numbers in its weights: buffers and shared weights are few.
PARAMETERS_A_NUMBER = 2
State = dict[str, torch.Tensor]


def tensors(data: bytes, place: Path) -> State:
    """The tensors of a safetensors file by name, copied from its bytes; `place` is what errors call it.

    Raises
    ------
    UserError
        The bytes are no safetensors file, or hold numbers of a kind that no export writes.
    """
    from safetensors.torch import load

    try:
        state = dict(load(data))
    except Exception as error:  # of a kind that torch does not know: KeyError
        raise UserError(f"weights file {place} cannot be read: {_line(error)}") from error
    for name, tensor in state.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            raise UserError(
                f"{place}: {name} is of type {kind}; allowed: {', '.join(sorted(_DTYPES))}"
            )
    return state


def build_model(
    document: Mapping[str, Any], state: State, place: Path
) -> tuple[RoadworkClassifier, ClassifierConfig]:
    """Build the classifier that `bundle.json` describes, with its weights, read from `place`, on the CPU.

    Raises
    ------
    UserError
        No such architecture; tensors missing, superfluous, of another shape or not finite; more
        parameters than the weights hold, found before room is made for them.
    """
    import timm

    config = ClassifierConfig.from_dict(document["classifier"])
    name = config.backbone.split(".")[0]
    if not timm.is_model(name):
        raise UserError(f'classifier.backbone "{config.backbone}" is no architecture of timm')
    if unknown := sorted(config.arguments.keys() - _ARGUMENTS):
        raise UserError(
            f"classifier.arguments.{unknown[0]} is unknown; allowed: {', '.join(sorted(_ARGUMENTS))}"
        )
    size = [config.preprocessing.height, config.preprocessing.width]
    if config.arguments.get("img_size", size) != size:
        raise UserError(f"classifier.arguments.img_size must be {size}, as in preprocessing")
    with _building("classifier", state):
        model = filled(config, state, place)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != document["parameters"]:
        raise UserError(f"parameters is {document['parameters']}; the model has {parameters}")
    return model, config


def build_views(
    document: Mapping[str, Any], state: State | None, place: Path, model: RoadworkClassifier
) -> Fusion:
    """Build the fusion that `bundle.json` describes, a trained one with its weights, read from `place`.

    Raises
    ------
    UserError
        Mode, options, features and weights do not fit each other, or a weight is not finite.
    """
    views = document["views"]
    trained = views["mode"] in TRAINED
    if trained != (document["cvfm_weights"] is not None):
        raise UserError(
            f"views.mode {views['mode']} {'needs' if trained else 'has no'} cvfm_weights"
        )
    if not trained or state is None:
        return Fusion(FusionConfig.from_dict(views))
    if views["features"] != model.backbone.num_features:
        raise UserError(
            f"views.features is {views['features']}; the backbone has {model.backbone.num_features}"
        )
    with _building("views", state):
        fusion = trained_fusion(FusionConfig.from_dict(views), state, place, lambda: model.head)
    network = fusion.network
    if network is None or not all(bool(t.isfinite().all()) for t in network.state_dict().values()):
        raise UserError(f"{place} holds numbers that are not finite")
    return fusion


def check_cost(
    model: RoadworkClassifier, config: ClassifierConfig, document: Mapping[str, Any]
) -> None:
    """Count the operations of an image's views, on tensors without numbers: nothing is computed.

    Raises
    ------
    UserError
        They are more than `MAX_OPERATIONS`.
    """
    size = (config.preprocessing.height, config.preprocessing.width)
    try:
        one_view = counted_on_meta(model, torch.zeros(1, 3, *size, device="meta"))
    except (NotImplementedError, RuntimeError):  # something in it needs numbers
        return
    operations = views_of_grid(document) * one_view
    if operations > MAX_OPERATIONS:
        raise UserError(
            f"all views of an image take {operations:.1e} operations; {MAX_OPERATIONS:.0e} are allowed"
        )


def check_answer(
    model: RoadworkClassifier, config: ClassifierConfig, fusion: Fusion, policy: Policy
) -> None:
    """Score one grey image; fusion gets the views of nothing, which cost no pass.

    Raises
    ------
    UserError
        What was stored fits together in no answer.
    """
    preprocessing, cpu = config.preprocessing, torch.device("cpu")
    image = Image.new("RGB", (preprocessing.width, preprocessing.height), "grey")
    one = ViewGrid(grid=1, flip=False)
    count = len(view_names(fusion.config.grid))
    try:
        scores = next(score_views(model, preprocessing, [image], one, 1, cpu))
        fused = fusion.fuse(
            np.repeat(scores.logits, count, axis=1),
            np.repeat(scores.features, count, axis=1) if scores.features is not None else None,
            np.ones((1, count), dtype=np.int64),
            np.repeat(scores.boxes, count, axis=1),
        )
        policy.deployed_probability(np.concatenate([scores.logits[0], fused]))
    except Exception as error:  # torch raises nearly anything on layers that do not fit
        raise UserError(f"the parts give no answer: {_line(error)}") from error


@contextmanager
def _building(key: str, state: State) -> Iterator[None]:
    """Bound what is built by what the weights hold, and turn torch's errors into one line."""
    stored = sum(tensor.numel() for tensor in state.values())
    try:
        with _at_most(PARAMETERS_A_NUMBER * stored + SPARE_PARAMETERS):
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} cannot be built: {_line(error)}") from error


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop this thread from building modules with more parameters; only the last one has room by then."""
    _budget.left = parameters
    try:
        yield
    finally:
        _budget.left = None


def _count(_module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    left: int | None = getattr(_budget, "left", None)
    if left is None or parameter is None:
        return
    _budget.left = left - parameter.numel()
    if _budget.left < 0:
        raise UserError(f"the model is far larger than its weights (at {name})")


# Parameters that this thread may still build; without it nothing is counted.
_budget = threading.local()
# Once and for all: torch's hooks may not come and go while another thread builds a module.
register_module_parameter_registration_hook(_count)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
