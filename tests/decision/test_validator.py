"""`PolicyValidator`: what every fit writes passes; each broken key is named with the reason."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from streetvision.core.errors import UserError
from streetvision.decision.abstention import Abstention
from streetvision.decision.calibrators import PlattMap
from streetvision.decision.choice import DEPLOYABLE
from streetvision.decision.ensemble import TIERS
from streetvision.decision.policy import Policy, fit_policy, scrc_document
from streetvision.decision.report import sweep_thresholds
from streetvision.decision.validator import PolicyValidator

VALIDATE = PolicyValidator().validate


def data(seed: int, groups: int = 20) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 20 * groups)
    return logits, rng.random(logits.size) < expit(logits), np.arange(logits.size) % groups


def scrc(calibrator: str = "platt") -> dict[str, Any]:
    policy, report = fit_policy(*data(0), 0.5, 50, 0, calibrator)
    document: dict[str, Any] = json.loads(json.dumps(scrc_document(policy, report)))
    return document


def threshold() -> dict[str, Any]:
    document, _ = sweep_thresholds(
        *data(0),
        n_thresholds=11,
        selection="exact",
        n_resamples=100,
        seed=0,
        split_used="val_calib",
    )
    return document


@pytest.mark.parametrize("calibrator", [*DEPLOYABLE, *TIERS])
def test_what_is_fitted_is_valid(calibrator: str) -> None:
    VALIDATE(scrc(calibrator))


def test_other_documents_that_are_written_are_valid() -> None:
    VALIDATE(threshold())
    few = sweep_thresholds(  # below 5 groups there is no interval
        *data(0, 3), n_thresholds=11, selection="exact", n_resamples=100, seed=0,
        split_used="val_calib",
    )[0]  # fmt: skip
    assert few["bagged"]["low"] is None
    VALIDATE(few)
    for least in (0.2, None):
        for method, delta in (("scrc_t", None), ("scrc_i", 0.1)):
            band = Abstention(method, "error", 0.1, delta, 9, least)  # type: ignore[arg-type]
            policy = Policy(PlattMap(1.0, 0.0), 0.6, 0.5, abstention=band)
            VALIDATE(scrc_document(policy, {"metrics": {"before": {}, "after": None}}))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("policy_type", "other", "policy_type is 'other'; it must be one of scrc, threshold"),
        ("scrc_params", None, "scrc_params is None; it must be object"),
        ("scrc_params.served_prior", 1.0, "scrc_params.served_prior is 1.0; it must be < 1"),
        ("scrc_params.served_prior", True, "scrc_params.served_prior is True; it must be number"),
        ("scrc_params.threshold_shift", float("nan"), "threshold_shift is nan; it must be number"),
        ("scrc_params.decision_threshold", 0.4, "scrc_params.decision_threshold is 0.4; it must be 0.5"),
        ("scrc_params.fit_on", "both", "scrc_params.fit_on is 'both'; it must be one of served, clean"),
        ("scrc_params.colour", 1, "scrc_params.colour is unknown; allowed: abstention, calibration"),
        ("scrc_params.calibrator.slope", 0, "scrc_params.calibrator.slope is 0; it must be > 0"),
        ("scrc_params.calibrator.kind", "isotonic", "kind is 'isotonic'; it must be one of platt, beta"),
        ("scrc_params.calibrator.kind", "beta", "scrc_params.calibrator lacks a"),
        ("scrc_params.calibrator.strictly_increasing", 1, "strictly_increasing is 1; it must be true"),
        ("scrc_params.abstention", {}, "scrc_params.abstention lacks alpha"),
        ("metrics.after", 3, "metrics.after is 3; it must be object or null"),
        ("metrics.before.natural.ece", "x", "metrics.before.natural.ece is 'x'; it must be number"),
    ],
)  # fmt: skip
def test_a_broken_key_is_named(path: str, value: Any, message: str) -> None:
    document = scrc()
    *parents, key = path.split(".")
    target = document
    for parent in parents:
        target = target[parent]
    target[key] = value
    with pytest.raises(UserError) as caught:
        VALIDATE(document)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_broken_key_is_named_at_once() -> None:
    document = scrc()
    document["scrc_params"]["served_prior"] = 2
    del document["metrics"]
    with pytest.raises(UserError, match=r"lacks metrics; scrc_params\.served_prior is 2"):
        VALIDATE(document)


@pytest.mark.parametrize("kind", ["scrc", "threshold"])
def test_every_key_is_needed_and_no_other_allowed(kind: str) -> None:
    whole = scrc("tier_3") if kind == "scrc" else threshold()

    def objects(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        here = [path] if isinstance(tree, dict) else []
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        deeper = [objects(v, (*path, k)) for k, v in items if isinstance(v, dict | list)]
        return here + [each for found in deeper for each in found]

    places = [path for path in objects(whole) if path[:1] != ("metrics",) or kind != "scrc"]
    assert len(places) > 3
    for path in places:
        document = deepcopy(whole)
        target = document
        for key in path:
            target = target[key]
        target["surplus"] = 1
        with pytest.raises(UserError, match="surplus"):
            VALIDATE(document)
        del target["surplus"]
        for key in list(target):
            value = target.pop(key)
            with pytest.raises(UserError, match=key):
                VALIDATE(document)
            target[key] = value


def test_what_a_schema_cannot_say_is_checked_too() -> None:
    document = scrc("pchip")
    document["scrc_params"]["calibrator"]["knots"].reverse()
    with pytest.raises(UserError, match="do not ascend"):
        VALIDATE(document)


@pytest.mark.parametrize("document", [None, 3, [], {}, {"policy_type": ["scrc"]}])
def test_something_else_is_refused(document: Any) -> None:
    with pytest.raises(UserError, match="policy_type"):
        VALIDATE(document)
