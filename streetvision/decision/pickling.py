"""The policy as a pickle, which the bundle's format asks for, loaded without trusting it.

`scrc_params.json` is the source of truth; the pickle holds the same document as plain containers.
Loading checks the SHA-256 first and then refuses every class and function, so that even a file
with a matching sum executes nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from typing import Any, NoReturn

from streetvision.decision.policy import Policy, policy_from_document
from streetvision.errors import UserError
from streetvision.escaping import terminal

# Fixed, so that the bytes do not depend on the Python version.
PROTOCOL = 4


class _PlainUnpickler(pickle.Unpickler):
    """Rebuilds dict, list, str, int, float, bool and None, for which pickle needs no class."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise UserError(
            f"the policy pickle names {module_name}.{global_name}; "
            "only plain containers are allowed"
        )


def dump_policy_pickle(document: dict[str, Any]) -> bytes:
    """Return the pickle of a `scrc_document`; equal documents give equal bytes.

    Raises
    ------
    UserError
        If the document does not describe a policy.
    """
    policy_from_document(document)
    # Pickle stores a string met twice as a reference, if it is one object: rebuild them all alike.
    plain = json.loads(json.dumps(document, sort_keys=True, allow_nan=False))
    return pickle.dumps(plain, protocol=PROTOCOL)


def load_policy_pickle(data: bytes, expected_sha256: str) -> Policy:
    """Return the policy of a pickle whose SHA-256 (hexadecimal) is `expected_sha256`.

    Raises
    ------
    UserError
        If the sum differs (the bytes are not looked at then), the pickle is damaged or names a
        class or function, or its document does not describe a policy.
    """
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected_sha256:
        raise UserError(
            f"the policy pickle has SHA-256 {actual}, not {expected_sha256}; it was not loaded"
        )
    return policy_from_document(plain_document(data))


def plain_document(data: bytes) -> dict[str, Any]:
    """Return what a pickle of plain containers holds; no class or function is loaded.

    Raises
    ------
    UserError
        The pickle is damaged, names a class or function, holds no dictionary, or something follows it.
    """
    stream = io.BytesIO(data)
    try:
        document = _PlainUnpickler(stream).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"the policy pickle is damaged: {terminal(str(error))}") from error
    if not isinstance(document, dict) or stream.read(1):
        raise UserError("the policy pickle is damaged: it is not one dictionary alone")
    return document
