"""`PolicyValidator`: policy documents against the JSON Schemas in `schemas/`.

The schemas are plain draft 2020-12 for any reader. Here they are checked with the keywords that
they use, which spares a dependency: `_CHECKS` and `_walk` are all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from streetvision.decision.policy import policy_from_document
from streetvision.errors import UserError

SCHEMAS = Path(__file__).parent / "schemas"
#: Schema file by `policy_type`.
POLICY_SCHEMAS = {"scrc": "scrc_params.schema.json", "threshold": "thresholds.schema.json"}

Schema = Mapping[str, Any]


class PolicyValidator:
    """Checks a policy document by its `policy_type`: `scrc` or `threshold`."""

    def validate(self, document: object) -> None:
        """Check the content of `scrc_params.json` or `thresholds.json`.

        Raises
        ------
        UserError
            Names every key that is missing, unknown or unusable, and why, in one line.
        """
        if not isinstance(document, Mapping) or "policy_type" not in document:
            raise UserError("the policy document needs a policy_type")
        kind = document["policy_type"]
        if not isinstance(kind, str) or kind not in POLICY_SCHEMAS:
            raise UserError(
                f"policy_type is {kind!r}; it must be one of {', '.join(POLICY_SCHEMAS)}"
            )
        errors = list(schema_errors(document, _load(POLICY_SCHEMAS[kind])))
        if errors:
            raise UserError("; ".join(errors))
        if kind == "scrc":
            policy_from_document(document)  # what no schema can say: rows that ascend, …


@cache
def _load(name: str) -> Schema:
    schema: Schema = json.loads((SCHEMAS / name).read_text())
    return schema


def schema_errors(document: object, schema: Schema) -> Iterator[str]:
    """Yield one line for each place where `document` breaks `schema`: the key, and why."""
    yield from _walk(document, schema, schema, "")


def _walk(value: Any, schema: Schema, root: Schema, path: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from _walk(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    for part in schema.get("allOf", ()):
        yield from _walk(value, part, root, path)
    if "if" in schema and not any(_walk(value, schema["if"], root, path)):
        yield from _walk(value, schema["then"], root, path)
    for keyword, check in _CHECKS.items():
        if keyword in schema and (wrong := check(value, schema[keyword])):
            yield f"{path or 'the document'} is {_shown(value)}; {wrong}"
            return  # what follows would repeat it
    if isinstance(value, Mapping):
        yield from _walk_object(value, schema, root, path)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from _walk(item, schema["items"], root, f"{path}[{index}]")


def _walk_object(
    value: Mapping[str, Any], schema: Schema, root: Schema, path: str
) -> Iterator[str]:
    known = schema.get("properties", {})
    rest = schema.get("additionalProperties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path or 'the document'} lacks {name}"
    for name, item in value.items():
        place = f"{path}.{name}" if path else str(name)
        if name in known:
            yield from _walk(item, known[name], root, place)
        elif rest is False:
            yield f"{place} is unknown; allowed: {', '.join(sorted(known))}"
        else:
            yield from _walk(item, rest, root, place)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, Mapping),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": _is_number,
    "integer": lambda v: _is_number(v) and v == int(v),
    "null": lambda v: v is None,
}


def _check_type(value: Any, wanted: str | list[str]) -> str | None:
    names = [wanted] if isinstance(wanted, str) else wanted
    return None if any(_TYPES[n](value) for n in names) else f"it must be {' or '.join(names)}"


def _is_one_of(value: Any, allowed: list[Any]) -> bool:
    """Equality as in JSON, where true is not 1."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed
    )


def _bound(name: str, fits: Callable[[float, float], bool]) -> Callable[[Any, float], str | None]:
    """Check of a number; other types pass, as JSON Schema has it."""
    return lambda v, limit: (
        None if not _is_number(v) or fits(v, limit) else f"it must be {name} {limit}"
    )


# Keyword to a check (value, keyword's value) -> what is wrong; in the order of checking.
_CHECKS: dict[str, Callable[[Any, Any], str | None]] = {
    "type": _check_type,
    "const": lambda v, one: None if _is_one_of(v, [one]) else f"it must be {json.dumps(one)}",
    "enum": lambda v, many: (
        None if _is_one_of(v, many) else f"it must be one of {', '.join(map(str, many))}"
    ),
    "minimum": _bound(">=", lambda v, limit: v >= limit),
    "exclusiveMinimum": _bound(">", lambda v, limit: v > limit),
    "maximum": _bound("<=", lambda v, limit: v <= limit),
    "exclusiveMaximum": _bound("<", lambda v, limit: v < limit),
    "minItems": lambda v, least: (
        f"it needs at least {least} items" if isinstance(v, list) and len(v) < least else None
    ),
}
