"""Named parameter sets: the defaults with the overrides of `<name>.yaml` in this folder."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streetvision.core.documents import read_yaml
from streetvision.core.errors import UserError
from streetvision.core.params import Params, check_params, leaves

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """All presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str, root: Path) -> Params:
    """The parameters of a preset; its relative paths to places outside the project become absolute.

    A queued experiment runs in a copy of the project elsewhere, where `../photos` would not be found.

    Raises
    ------
    UserError
        Unknown name.
    """
    if name not in preset_names():
        raise UserError(f'preset "{name}" is not one of {", ".join(preset_names())}')
    document = merge(Params().model_dump(mode="json"), preset_changes(name))
    for section, key in (("data", "local_root"), ("train", "weights")):
        value = document[section][key]
        if value.startswith("../"):
            document[section][key] = str((root / value).resolve())
    return check_params(document, f"preset {name}")


def preset_changes(name: str) -> Mapping[str, Any]:
    """What a preset's file says."""
    path = FOLDER / f"{name}.yaml"
    return read_yaml(path.read_bytes(), path.name) or {}


def overrides(params: Params, current: Mapping[str, Any]) -> list[str]:
    """Arguments for `dvc exp run` that turn the document `current` into `params`; shell-quoted.

    Each is `-S key=value` in Hydra's grammar, in which JSON's strings, lists and objects are valid.
    """
    wanted = params.model_dump(mode="json")
    return [
        f"-S {shlex.quote(f'{key}={_hydra(value(wanted, key))}')}"
        for key in leaves(wanted)
        if value(wanted, key) != value(current, key)
    ]


def value(document: Mapping[str, Any], key: str) -> Any:
    """The leaf `key` (dotted) of a nested document, None where it is missing."""
    found: Any = document
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def merge(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `given` laid over it, section by section; lists are replaced whole."""
    merged = dict(base)
    for key, change in given.items():
        both = isinstance(change, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], change) if both else change
    return merged


def _hydra(data: Any) -> str:
    """A value in Hydra's override grammar: quoted strings, unquoted keys."""
    if isinstance(data, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in data.items()) + "}"
    if isinstance(data, list):
        return "[" + ",".join(_hydra(item) for item in data) + "]"
    if isinstance(data, str):
        # A backslash counts as itself unless a quote, also the closing one, follows.
        return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), data) + "'"
    return json.dumps(data)
