"""YAML and JSON that someone else may have written, read within bounds and without a second meaning.

A few lines of YAML can stand for more than any memory holds (aliases of aliases), for themselves, or for two
values at once (a key that is there twice, of which a parser takes the last). All of that is refused, with the
line, before anything is built.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from streetvision.core.errors import UserError

# What `dvc.lock` and `params.yaml` hold is a hundredth of it.
MAX_BYTES = 2**23
MAX_NODES, MAX_DEPTH = 200_000, 64
MAX_DIGITS = 300  # a larger number is infinite as a float


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, by libyaml where it is, of what JSON has, too: keys and dates are text.

    `1e-3` is a number, as for DVC (YAML 1.2).
    """

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A finite number that is no longer than numbers are."""
        if len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value):,} characters")
        kind = node.tag.rpartition(":")[2]
        found: int | float = getattr(self, f"construct_yaml_{kind}")(node)
        if not math.isfinite(found):  # an OverflowError of a hexadecimal one
            raise ValueError(f"{node.value} is not finite")
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """A mapping from texts."""
        self.flatten_mapping(node)
        for key, _ in node.value:
            key.tag = "tag:yaml.org,2002:str"
        found: dict[str, Any] = super().construct_mapping(node, deep=deep)
        return found


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [
        each for each in _resolvers if not each[0].endswith(":timestamp")
    ]


def read_yaml(text: str | bytes, origin: str) -> Any:
    """What a YAML document holds; None if it is empty. `origin` names it in errors.

    Raises
    ------
    UserError
        Not UTF-8 or not YAML, a key twice in one mapping, a value that holds itself, a tag, or more than
        8 MiB, 200,000 values (aliases followed), 64 levels, 300 characters in a number.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{origin} is larger than {MAX_BYTES // 2**20} MiB")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        events = _Events(origin)
        for event in yaml.parse(text, Loader=_Loader):
            events.take(event)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error


def read_json(text: str | bytes, origin: str) -> Any:
    """What a JSON document holds, with finite numbers; `origin` names it in errors.

    Raises
    ------
    UserError
        Not UTF-8 or not JSON, NaN or infinite, too deep, or a number of more than 300 characters.
    """
    try:
        return json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_not_finite)
    except RecursionError as error:
        raise UserError(f"{origin} is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{origin} is not valid JSON: {error}") from error


def mapping_in(document: Any, key: str, origin: str) -> Mapping[str, Any]:
    """The mapping `document[key]`, empty where there is none; UserError where it is something else."""
    found = document.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise UserError(f"{origin}: {key} must be a mapping")
    return found


@dataclass
class _Open:
    """A mapping or sequence whose end has not come yet."""

    anchor: str | None
    keys: dict[str, int] | None  # of a mapping: the line of each
    key_is_next: bool = True
    nodes: int = 1


class _Events:
    """Follows a document's events, which takes no more memory than its text; UserError as `read_yaml`."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.stack = [_Open(None, None)]
        self.sizes: dict[str, int] = {}  # by anchor, aliases followed

    def take(self, event: Any) -> None:
        """The next event."""
        if getattr(event, "tag", None) is not None:
            self._refuse(event, "a tag (!) is not taken")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.sizes:  # unknown, or not closed yet
                known = any(each.anchor == event.anchor for each in self.stack)
                problem = "holds itself" if known else "is not defined"
                self._refuse(event, f"*{event.anchor} {problem}")
            self._place(event, None)
            self._count(event, self.sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            self._place(event, event.value)
            self._count(event, 1)
            if event.anchor is not None:
                self.sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(self.stack) > MAX_DEPTH:
                self._refuse(event, f"more than {MAX_DEPTH} levels")
            self._place(event, None)
            keys: dict[str, int] | None = {} if isinstance(event, yaml.MappingStartEvent) else None
            self.stack.append(_Open(event.anchor, keys))
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = self.stack.pop()
            if closed.anchor is not None:
                self.sizes[closed.anchor] = closed.nodes
            self._count(event, closed.nodes)

    def _place(self, event: Any, key: str | None) -> None:
        """A value that begins, or in a mapping perhaps the key of the next one."""
        parent = self.stack[-1]
        if parent.keys is not None and parent.key_is_next:
            if key is None:
                self._refuse(event, "a key must be plain text")
            if key in parent.keys:
                self._refuse(
                    event, f'"{key}" is there already, in line {parent.keys[key]}; keep one'
                )
            parent.keys[key] = event.start_mark.line + 1
        parent.key_is_next = not parent.key_is_next

    def _count(self, event: Any, nodes: int) -> None:
        self.stack[-1].nodes += nodes
        if self.stack[-1].nodes > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES:,} values")

    def _refuse(self, event: Any, problem: str) -> NoReturn:
        raise UserError(f"{self.origin} line {event.start_mark.line + 1}: {problem}")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} characters")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not finite")
    return value


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
