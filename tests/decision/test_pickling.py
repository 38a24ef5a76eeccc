"""The policy pickle executes nothing, whatever it holds."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from streetvision.decision.calibrators import PlattMap
from streetvision.decision.pickling import dump_policy_pickle, load_policy_pickle
from streetvision.decision.policy import Policy, scrc_document
from streetvision.errors import UserError

POLICY = Policy(PlattMap(0.1 + 0.2, -1 / 3), 0.78, 0.5, 0.1)
DOCUMENT = scrc_document(POLICY, {"metrics": {"before": {"ece": 0.1}, "after": {"ece": 0.01}}})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hostile:
    """Unpickled without care, it runs a shell command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_round_trip_is_exact() -> None:
    data = dump_policy_pickle(DOCUMENT)
    assert load_policy_pickle(data, sha256(data)) == POLICY
    assert pickle.loads(data) == DOCUMENT  # plain containers: any pickle reader gets the document


def test_equal_documents_give_equal_bytes() -> None:
    again = json.loads(json.dumps(DOCUMENT))
    reordered = dict(reversed(list(again.items())))
    assert dump_policy_pickle(DOCUMENT) == dump_policy_pickle(reordered)


def test_a_hostile_pickle_executes_nothing_even_if_its_sum_matches(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    data = pickle.dumps({"policy_type": "scrc", "scrc_params": Hostile(marker)})
    with pytest.raises(UserError, match=r"system; only plain containers"):
        load_policy_pickle(data, sha256(data))
    assert not marker.exists()
    pickle.loads(data)  # it is hostile indeed
    assert marker.exists()


def test_bytes_are_not_looked_at_unless_the_sum_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("unpickled before the sum was checked")

    monkeypatch.setattr("streetvision.decision.pickling._PlainUnpickler", forbidden)
    with pytest.raises(UserError, match="it was not loaded"):
        load_policy_pickle(dump_policy_pickle(DOCUMENT), sha256(b"something else"))


def test_our_own_classes_are_refused_too() -> None:
    data = pickle.dumps(POLICY)
    with pytest.raises(UserError, match="only plain containers"):
        load_policy_pickle(data, sha256(data))


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps(DOCUMENT)[:-5]])
def test_a_damaged_pickle_is_a_user_error(data: bytes) -> None:
    with pytest.raises(UserError, match="damaged"):
        load_policy_pickle(data, sha256(data))


def test_a_document_that_is_no_policy_is_neither_written_nor_read() -> None:
    with pytest.raises(UserError, match="lacks"):
        dump_policy_pickle({"policy_type": "scrc"})
    data = pickle.dumps({"policy_type": "scrc"})
    with pytest.raises(UserError, match="lacks"):
        load_policy_pickle(data, sha256(data))
