"""Weights files, whoever wrote them: read without running code, found in their wrappings, adapted as timm does.

People's files hold a backbone under the names that a trainer, a compiler or several devices gave it, beside
optimiser states, settings and heads. It is taken whole or not at all.
"""

from __future__ import annotations

import logging
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streetvision.core.errors import UserError

log = logging.getLogger(__name__)
State = dict[str, Tensor]

# Parts of names that wrappers put before or between a network's own: DDP, torch.compile, FSDP, DeepSpeed.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
# A moving average is taken before what it averages, as timm takes `state_dict_ema`.
_AVERAGE = re.compile(r"(^|[._])ema([._]|$)")
# Where trainers keep the network itself, before copies that their callbacks keep.
_USUAL = ("", "state_dict", "model", "network", "net")
_DEPTH = 6  # of dictionaries in dictionaries
_COUNTER = "num_batches_tracked"  # of BatchNorm; files from before torch 0.4.1 lack it, and nothing reads it

# What a file is that cannot hold weights, by how it begins.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the weights; `git lfs pull` fetches them"),
    (b"<", "is a web page, not the weights; download the file itself, on the hub by its /resolve/ address"),
    (b"{", "is JSON, such as the index of weights in several files; those need to be merged into one"),
    (b"\x89HDF", "is HDF5, as Keras writes it; weights of torch are needed"),
    (b"\x1f\x8b", "is compressed; unpack it first"),
    (b"BZh", "is compressed; unpack it first"),
    (b"\xfd7zXZ", "is compressed; unpack it first"),
)  # fmt: skip
# Objects of the standard library, builtins and torch that checkpoints hold beside weights. They are not made:
# a stand-in takes their place, as for every class of other libraries.
_HARMLESS = frozenset(
    {
        "argparse.Namespace", "types.SimpleNamespace", "typing.Any", "decimal.Decimal", "uuid.UUID",
        "datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone",
        "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
        "builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.list",
        "builtins.dict", "builtins.tuple", "torch.torch_version.TorchVersion",
    }
)  # fmt: skip
_NUMPY = tuple(
    f"numpy.{name}"
    for name in ("dtype", "ndarray", "core.multiarray.scalar", "_core.multiarray.scalar",
                 "core.multiarray._reconstruct", "_core.multiarray._reconstruct")
)  # fmt: skip
_DICTIONARIES = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
# Names that tell whose weights these are, and what can be done.
_HINTS = (
    ("lora_", "it holds adapters, which must be merged into their backbone first"),
    ("embeddings.patch_embeddings.", "these are transformers' names; take timm's file of the same weights"),
    ("embedder.", "these are transformers' names; take timm's file of the same weights"),
    ("encoder.layers.encoder_layer_", "these are torchvision's names; take timm's file of such weights"),
)  # fmt: skip


class _StandIn:
    """In place of an object that no weights need: takes whatever it is made of, does and keeps nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Dictionary:
    """In place of a kind of dictionary: a plain one."""

    def __new__(cls, *_: object) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a timm backbone with the weights in a file, whatever these are wrapped in; heads are left out.

    Position embeddings, patches and names of another size or origin become the backbone's as timm's own
    `checkpoint_filter_fn` makes them.

    Raises
    ------
    UserError
        The file is missing, unreadable, ambiguous or not finite, or lacks a part of this backbone.
    """
    found = read_state_dict(path)
    prefix, state = _find(found, model, path)
    kept, foreign = _without_foreign(state, model)
    before = _differences(model, kept)
    if before.count:
        adapted, reason = _as_timm_does(state, model)
        kept, foreign = _without_foreign(adapted, model)
        differences = min(before, _differences(model, kept), key=lambda each: each.count)
        if differences.count:
            few = len(differences.missing) > len(model.state_dict()) // 2
            raise UserError(f"{path} {differences.told()}{reason}{_hint(found, path, few)}")
        _tell_resampled(state, kept, path)
    fill(model, kept, path)
    if prefix:
        log.info("%s: the backbone is what lies below %s", path.name, prefix.rstrip("."))
    if foreign:
        log.warning(
            "%s: left out, for this backbone has no such parts: %s", path.name, _some(foreign)
        )


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state`, read from `path`, strictly.

    Raises
    ------
    UserError
        It belongs to another architecture, or holds numbers that are not finite.
    """
    differences = _differences(model, state)
    if differences.count:
        raise UserError(f"{path} {differences.told()}")
    bad = [name for name, value in state.items() if not bool(torch.isfinite(value.float()).all())]
    if bad:
        raise UserError(f"{path} holds numbers that are not finite, in {_some(bad)}")
    model.load_state_dict({**model.state_dict(), **state})


# --------------------------------------------------------------------------- reading


def read_state_dict(path: Path) -> State:
    """Read the tensors of a file of safetensors or `torch.save`, told apart by content, by name.

    Names of dictionaries in dictionaries are joined by dots. Code stored in the file never runs.

    Raises
    ------
    UserError
        There is no such file, or it is none of these, or damaged.
    """
    if path.is_dir():
        raise UserError(f"weights file {path} is a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        with path.open("rb") as file:
            start = file.read(64)
        size = path.stat().st_size
        header = int.from_bytes(start[:8], "little")
        # Eight bytes of length, then JSON.
        if start[8:9] == b"{" and header < 2**31:
            if header > size - 8:
                raise UserError(f"weights file {path} is not whole; copy or download it again")
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = _torch_content(path, start)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"weights file {path} cannot be read: {_reason(error)}") from error
    found = dict(_tensors(content))
    if not found:
        raise UserError(f"weights file {path} holds no tensors by name; save a state_dict()")
    return found


def _torch_content(path: Path, start: bytes) -> object:
    """What `torch.save` wrote, with stand-ins for all that is no tensor and no plain Python."""
    begin = start.lstrip()
    for signature, meaning in _OTHERS:
        if begin.startswith(signature):
            raise UserError(f"weights file {path} {meaning}")
    if not start:
        raise UserError(f"weights file {path} is empty; copy or download it again")
    names: Iterable[str] = ()
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise UserError(f"weights file {path} is not whole; copy or download it again")
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
        if "data.pkl" not in members or "constants.pkl" in members:
            kind = "TorchScript" if "constants.pkl" in members else "an archive of something else"
            raise UserError(f"weights file {path} is {kind}; save the network's state_dict()")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        _refuse_objects(names, path)
    elif start[:1] != b"\x80":  # a pickle, as `torch.save` wrote before torch 1.6
        raise UserError(
            f"weights file {path} is neither safetensors nor written by torch.save; take one of these"
        )
    stand_ins: dict[str, Any] = dict.fromkeys((*_HARMLESS, *_NUMPY, *names), _StandIn)
    stand_ins |= dict.fromkeys(_DICTIONARIES, _Dictionary)
    allowed: list[Any] = [(made, name) for name, made in stand_ins.items()]
    # An open file: of a path torch would believe the suffix.
    with torch.serialization.safe_globals(allowed), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _refuse_objects(names: Iterable[str], path: Path) -> None:
    """Refuse what could only be there to run, and whole networks, whose tensors are in no dictionary."""
    known = {*_HARMLESS, *_NUMPY, *_DICTIONARIES}
    for name in sorted(set(names) - known):
        module, _, rest = name.partition(".")
        root = IMPORT_MAPPING.get(module, module)  # torch.save writes Python 2's names of modules
        if name.startswith("torch.nn."):
            raise UserError(
                f"weights file {path} holds a whole pickled network ({name}); save its state_dict()"
            )
        if root in {"torch", "builtins", "numpy"} or root in sys.stdlib_module_names:
            raise UserError(
                f"weights file {path} calls {root}.{rest} when it is loaded, which weights do not need; it is "
                "not read: save the state_dict() alone"
            )


def _reason(error: Exception) -> str:
    """The first sentence of a library's message, which may be a page."""
    said = " ".join(str(error).split())
    if re.search("incomplete|not fully covered|unexpected EOF|truncated|Ran out of input", said):
        return "it is not whole; copy or download it again"
    if "Unsupported operand" in said:
        return "it is pickled in another way than torch.save's own, protocol 2; save it with that"
    blocked = re.search(r"GLOBAL (\S+) was not an allowed|unsupported GLOBAL (\S+)", said)
    if blocked:
        return f"it holds {blocked[1] or blocked[2]} beside weights; save the state_dict() alone"
    return re.split(r"(?<=[a-z])\. ", said)[0][:200] or type(error).__name__


def _tensors(content: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors in dictionaries with names, with theirs."""
    if isinstance(content, Tensor):
        yield name, content.detach()
    elif isinstance(content, Mapping) and depth < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str):
                yield from _tensors(value, f"{name}.{key}" if name else key, depth + 1)


# --------------------------------------------------------------------------- finding


def _find(found: State, model: nn.Module, path: Path) -> tuple[str, State]:
    """What the names of the backbone's tensors begin with in a file, and the tensors below it.

    Raises
    ------
    UserError
        Several networks in the file are as near, and their weights differ.
    """
    wanted = {name for name in model.state_dict() if not name.endswith(_COUNTER)}
    removed = WRAPPERS - {part for name in wanted for part in name.split(".")}
    named = {
        ".".join(p for p in name.split(".") if p not in removed): v for name, v in found.items()
    }
    counts: Counter[str] = Counter()
    for name in named:
        start = 0
        while True:
            if name[start:] in wanted:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1
            if not start:
                break
    if not counts:
        return "", named
    most = max(counts.values())
    best = sorted((p for p, count in counts.items() if count == most), key=_preference)

    def below(prefix: str) -> State:
        return {n.removeprefix(prefix): v for n, v in named.items() if n.startswith(prefix)}

    chosen = below(best[0])
    for other in best[1:]:
        if _preference(other) == _preference(best[0]) and not _same(chosen, below(other), wanted):
            shown = " and ".join(p.rstrip(".") or "the top" for p in (best[0], other))
            raise UserError(
                f"{path} holds several networks, at {shown}; save the one that is meant in a file of its own"
            )
    return best[0], chosen


def _preference(prefix: str) -> tuple[bool, bool]:
    """Sorts averages first, then what lies where the network itself usually does."""
    return _AVERAGE.search(prefix) is None, prefix.split(".", maxsplit=1)[0] not in _USUAL


def _same(one: State, other: State, names: Iterable[str]) -> bool:
    return all(
        one[name].shape == other[name].shape and torch.equal(one[name], other[name])
        for name in names
        if name in one and name in other
    )


def _without_foreign(state: Mapping[str, Tensor], model: nn.Module) -> tuple[State, list[str]]:
    """`state` without heads and other parts that the backbone does not have; and the latter's names.

    Of a part that it has, as of a block too many, everything stays, to be refused.
    """
    config: Any = getattr(model, "pretrained_cfg", {})
    head = config.get("classifier") or ()
    heads = {each.split(".")[0] for each in ((head,) if isinstance(head, str) else head)}
    wanted = model.state_dict().keys()
    kept, foreign = {}, set()
    for name, value in state.items():
        part = name.split(".")[0]
        if name in wanted or (part not in heads and hasattr(model, part)):
            kept[name] = value
        elif part not in heads:
            foreign.add(part)
    return kept, sorted(foreign)


def _as_timm_does(state: State, model: nn.Module) -> tuple[State, str]:
    """`state` as timm's loader of this family makes it, and why it cannot, in words."""
    adapt: Callable[..., State] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if adapt is None:
        return state, ""
    try:
        with torch.no_grad():
            return dict(adapt(dict(state), model)), ""
    except Exception as error:  # whatever a strange dictionary leads to
        return state, f"; timm cannot adapt it ({_reason(error)})"


def _tell_resampled(before: State, after: State, path: Path) -> None:
    for name in sorted(before.keys() & after.keys()):
        one, other = before[name], after[name]
        if one.shape != other.shape:
            log.info(
                "%s: %s %s becomes %s, as timm does it", path.name, name, _kind(one), _kind(other)
            )


# --------------------------------------------------------------------------- comparing


class _Differences:
    """What keeps a state from being a model's."""

    def __init__(self, missing: list[str], unexpected: list[str], unlike: list[str]) -> None:
        self.missing, self.unexpected, self.unlike = missing, unexpected, unlike

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.unlike)

    def told(self) -> str:
        parts = [
            f"{len(names)} {what}" + (f" ({_some(names, 2)})" if names else "")
            for names, what in (
                (self.missing, "tensors missing"), (self.unexpected, "unexpected"),
                (self.unlike, "of another shape or type"),
            )
        ]  # fmt: skip
        return f"holds weights of another architecture: {', '.join(parts)}"


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> _Differences:
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in state and not n.endswith(_COUNTER)]
    unlike = [
        f"{name}: {_kind(state[name])} for {_kind(own)}"
        for name, own in wanted.items()
        if name in state and not _alike(own, state[name])
    ]
    return _Differences(missing, sorted(state.keys() - wanted.keys()), unlike)


def _alike(own: Tensor, found: Tensor) -> bool:
    """Whether `found` can be copied into `own` without becoming something else, as quantised weights would."""
    plain = found.layout == torch.strided and not found.is_quantized and found.device.type == "cpu"
    counts = own.ndim == 0  # what a BatchNorm has counted, which some files hold as a float
    kinds = counts or (
        own.is_floating_point() == found.is_floating_point() and not found.is_complex()
    )
    return plain and kinds and own.shape == found.shape


def _kind(tensor: Tensor) -> str:
    """Shape and, but for the usual, type and layout, in words."""
    words = [" × ".join(map(str, tensor.shape)) or "one number"]
    if tensor.dtype != torch.float32:
        words.append(str(tensor.dtype).removeprefix("torch."))
    if tensor.layout != torch.strided:
        words.append("sparse")
    return " ".join(words)


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _hint(found: State, path: Path, few: bool) -> str:
    """What may be done, where `few` of the backbone's names are in the file."""
    if re.search(r"-\d{5}-of-\d{5}", path.name):
        return "; it is one of several files, which must be merged into one"
    for part, advice in _HINTS:
        if any(part in name for name in found):
            return f"; {advice}"
    return f"; its names are such as {_some(sorted(found), 2)}" if few else ""
