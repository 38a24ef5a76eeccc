"""`PolicyValidator`: policy documents against the JSON Schemas in `schemas/`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streetvision.decision.policy import policy_from_document
from streetvision.errors import UserError

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parent / "schemas"
#: Schema file by `policy_type`.
POLICY_SCHEMAS = {"scrc": "scrc_params.schema.json", "threshold": "thresholds.schema.json"}


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
        errors = list(_errors(document, _schema(POLICY_SCHEMAS[kind])))
        if errors:
            raise UserError("; ".join(errors))
        if kind == "scrc":
            policy_from_document(document)  # what no schema can say: rows that ascend, …


@cache
def _schema(name: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    plain = Draft202012Validator.TYPE_CHECKER
    # JSON has no NaN and no infinity, and every comparison with NaN would pass.
    finite = plain.redefine("number", lambda _, v: plain.is_type(v, "number") and math.isfinite(v))
    checker = extend(Draft202012Validator, type_checker=finite)  # type: ignore[no-untyped-call]
    schema = json.loads((SCHEMAS / name).read_text())
    checker.check_schema(schema)
    found: Draft202012Validator = checker(schema)
    return found


def _errors(document: object, schema: Draft202012Validator) -> Iterator[str]:
    """Yield a line for each wrong key, those of outer objects first, and why it is wrong."""
    said = set()
    for error in sorted(schema.iter_errors(document), key=lambda each: len(each.absolute_path)):
        path = error.json_path.removeprefix("$").removeprefix(".")
        for about, line in _lines(error, path):
            if about not in said:  # further errors of one value would repeat it
                said.add(about)
                yield line


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
}
