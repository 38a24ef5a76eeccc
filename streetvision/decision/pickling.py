"""The policy as a pickle, which the bundle's format asks for: written here, and never loaded.

`scrc_params.json` is the source of truth; the pickle holds the same document as plain containers. A pickle
from somebody else may run code where it is loaded, or ask for any amount of memory (`LONG_BINPUT`), so a copy
is told by its bytes.
"""

from __future__ import annotations

import json
import pickle
from typing import Any

from streetvision.decision.policy import policy_from_document

# Fixed, so that the bytes do not depend on the Python version.
PROTOCOL = 4


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
