"""`PolicyValidator`: policy documents against the JSON Schemas in `schemas/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streetvision.core.errors import UserError
from streetvision.core.json_schema import schema_errors
from streetvision.decision.policy import policy_from_document

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
        errors = schema_errors(document, SCHEMAS / POLICY_SCHEMAS[kind])
        if errors:
            raise UserError("; ".join(errors))
        if kind == "scrc":
            policy_from_document(document)  # what no schema can say: rows that ascend, …
