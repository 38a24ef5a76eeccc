"""The policy's pickle holds the document as plain containers, and its bytes tell it."""

from __future__ import annotations

import json
import pickle
import pickletools

import pytest

from streetvision.core.errors import UserError
from streetvision.decision.calibrators import PlattMap
from streetvision.decision.pickling import dump_policy_pickle
from streetvision.decision.policy import Policy, policy_from_document, scrc_document

POLICY = Policy(PlattMap(0.1 + 0.2, -1 / 3), 0.78, 0.5, 0.1)
DOCUMENT = scrc_document(POLICY, {"metrics": {"before": {"ece": 0.1}, "after": {"ece": 0.01}}})


def test_round_trip_is_exact() -> None:
    found = pickle.loads(dump_policy_pickle(DOCUMENT))
    assert found == DOCUMENT
    assert policy_from_document(found) == POLICY


def test_any_reader_gets_it_without_a_class() -> None:
    names = {code.name for code, _, _ in pickletools.genops(dump_policy_pickle(DOCUMENT))}
    assert not names & {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE"}


def test_equal_documents_give_equal_bytes() -> None:
    again = json.loads(json.dumps(DOCUMENT))
    reordered = dict(reversed(list(again.items())))
    assert dump_policy_pickle(DOCUMENT) == dump_policy_pickle(reordered)


def test_a_document_that_is_no_policy_is_not_written() -> None:
    with pytest.raises(UserError, match="lacks"):
        dump_policy_pickle({"policy_type": "scrc"})
