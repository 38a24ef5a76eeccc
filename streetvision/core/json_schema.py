"""Documents against a JSON Schema, with errors for the person who has to fix them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator


def schema_errors(document: object, schema: Path) -> list[str]:
    """A line for each wrong key of `document`, those of outer objects first, and why it is wrong."""
    lines: dict[str, str] = {}
    errors = _checker(schema).iter_errors(document)
    for error in sorted(errors, key=lambda each: len(each.absolute_path)):
        path = error.json_path.removeprefix("$").removeprefix(".")
        for about, line in _lines(error, path):
            lines.setdefault(about, line)  # further errors of one value would repeat it
    return list(lines.values())


@cache
def _checker(schema: Path) -> Draft202012Validator:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    plain = Draft202012Validator.TYPE_CHECKER
    # JSON has no NaN and no infinity, and every comparison with NaN would pass.
    finite = plain.redefine(
        "number", lambda _, v: plain.is_type(v, "number") and abs(v) <= sys.float_info.max
    )
    checker = extend(Draft202012Validator, type_checker=finite)  # type: ignore[no-untyped-call]
    document = json.loads(schema.read_text())
    checker.check_schema(document)
    found: Draft202012Validator = checker(document)
    return found


def _lines(error: Any, path: str) -> Iterator[tuple[str, str]]:
    """What an error is about, and its line."""
    wanted: Any = error.validator_value
    place = path or "the document"
    if error.validator == "required":
        for name in wanted:
            if name not in error.instance:
                yield f"{path}.{name}", f"{place} lacks {name}"
    elif error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for name in error.instance:
            if name not in known:
                inner = f"{path}.{name}" if path else name
                yield inner, f"{inner} is unknown; allowed: {', '.join(sorted(known))}"
    else:
        text = repr(error.instance)
        shown = text if len(text) <= 60 else f"{text[:57]}…"
        must = _MUST.get(str(error.validator), f"{error.validator} must be {{}}")
        if isinstance(wanted, list):
            wanted = (" or " if error.validator == "type" else ", ").join(map(str, wanted))
        elif not isinstance(wanted, str):
            wanted = json.dumps(wanted)
        yield path, f"{place} is {shown}; {must.format(wanted)}"


_MUST = {
    "type": "it must be {}",
    "const": "it must be {}",
    "enum": "it must be one of {}",
    "minimum": "it must be >= {}",
    "exclusiveMinimum": "it must be > {}",
    "maximum": "it must be <= {}",
    "exclusiveMaximum": "it must be < {}",
    "minItems": "it needs at least {} items",
    "maxItems": "it may have at most {} items",
    "maxProperties": "it may have at most {} keys",
    "pattern": "it must match {}",
}
