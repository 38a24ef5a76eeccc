"""The bundle's calibration on new cities."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.special import expit

from streetvision import cli
from streetvision.bundle.predictor import Predictor
from streetvision.core.errors import UserError
from streetvision.core.params import Params
from streetvision.data.store import open_split
from streetvision.sources import ingest
from streetvision.stats.metrics import all_metrics, prior_weights
from streetvision.studies.data import WHOLE
from streetvision.studies.fresh import SEED_OFFSET, fresh_params, measure, write_report

if TYPE_CHECKING:
    from tests.conftest import Trained

SMALL: dict[str, Any] = {
    "data": {
        "sources": [
            {"kind": "synthetic", "name": "s", "images": 500, "cities": 60, "width_px": 96,
             "height_px": 72}
        ],
        "side_px": 48,
    },
    "evaluate": {"n_resamples": 200},
}  # fmt: skip


def test_new_scenes_have_another_seed_and_nothing_else_changes() -> None:
    params = Params(**SMALL)
    fresh = fresh_params(params, 1000, 70)
    assert fresh.seed == params.seed + SEED_OFFSET
    source = fresh.data.sources[0].model_dump()
    assert (source.pop("images"), source.pop("cities")) == (1000, 70)
    old = params.data.sources[0].model_dump()
    assert source == {key: old[key] for key in source}
    photos = Params(data={"sources": [{"kind": "csv", "path": "labels.csv"}]})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not rendered scenes"):
        fresh_params(photos, 1000, 70)


@pytest.mark.parametrize("condition", ["clean", "served"])
def test_the_bundle_is_scored_on_the_images_its_policy_was_fitted_on(
    condition: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = Params(**SMALL | {"subnet": {"validator": "crop"}})
    load = Predictor.load

    def loaded(*arguments: Any) -> Predictor:
        predictor = load(*arguments)
        predictor.policy = replace(predictor.policy, fit_on=condition, threshold_shift=0.7)
        return predictor

    monkeypatch.setattr(Predictor, "load", loaded)
    report = measure(trained.bundle, params, 120, 12, tmp_path, 1)
    assert (report["cities"], report["condition"]) == (12, condition)
    assert [report[name]["n"] for name in ("calibrated", "deployed")] == [120, 120]
    (path,) = tmp_path.glob(f"scenes-*/{WHOLE}")
    split = open_split("evaluate", "val_test", path)
    policy = load(trained.bundle).policy
    clean = load(trained.bundle).logits(split.image(row) for row in range(len(split)))
    for name, shift in (("calibrated", 0.0), ("deployed", 0.7)):
        answers = expit(policy.calibrated_logit(clean) + shift)
        found = all_metrics(split.labels, answers, prior_weights(split.labels, 0.5))
        same = report[name]["served"]["log_loss"] == pytest.approx(found["log_loss"])
        assert same == (condition == "clean")

    monkeypatch.setattr(ingest, "ingest_sources", lambda *_, **__: pytest.fail("rendered again"))
    again = measure(trained.bundle, params, 120, 12, tmp_path, 1)
    assert again == report


def report_of(low: float, high: float) -> dict[str, Any]:
    """The parts of a report that the document takes."""
    values = {"mcc": 0.9, "accuracy": 0.95, "log_loss": 0.1, "ece": 0.01, "ece_debiased": 0.008}
    report = {
        "n": 20000, "n_groups": 80, "served": values, "served_prior": 0.5,
        "served_interval": {"ece_debiased": {"low": low, "high": high}},
        "effective_groups": {"negatives": 71.25, "positives": 74.0},
        "ece_detail": {"bins": 15, "noise_floor": 0.004, "noise_floor_upper": 0.006},
    }  # fmt: skip
    deployed = report | {"served_interval": {"ece_debiased": {"low": 0.04, "high": 0.06}}}
    return {
        "condition": "clean", "cities": 80, "seed": 1, "bundle_sha256": "0123456789abcdef",
        "threshold_shift": -0.6, "calibrated": report, "deployed": deployed,
    }  # fmt: skip


def test_the_verdict_is_about_the_upper_bound(tmp_path: Path) -> None:
    out = tmp_path / "ece.md"
    assert write_report(report_of(0.0, 0.0199), out, "c").endswith("is 0.0199: below 0.02.")
    assert json.loads(out.with_suffix(".json").read_text()) == report_of(0.0, 0.0199)
    assert write_report(report_of(0.0, 0.02), out, "c").endswith("is 0.0200: not below 0.02.")
    text = out.read_text()
    assert "| debiased ECE | 0.0080 | [0.0000, 0.0200] | 0.0080 | [0.0400, 0.0600] |" in text
    assert "calibrated ones -0.600" in text
    assert "80 groups, which tell as much as 71.2 of equal size" in text
    assert "| ECE | 0.0100 | none | 0.0100 | none |" in text
    report = report_of(0, 0)
    report["calibrated"]["served_interval"] = {}
    with pytest.raises(UserError, match="80 groups give no interval"):
        write_report(report, out, "c")


def test_command(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(Params(**SMALL).model_dump(mode="json")))
    arguments = ["evidence", "ece", "--images", "240", "--cities", "24", "--workers", "1"]
    assert cli.main([*arguments, "--bundle", str(trained.bundle)]) == 0
    report = json.loads((tmp_path / "docs/evidence/ece.json").read_text())
    assert report["calibrated"]["n"] == 240
    assert np.isfinite(report["calibrated"]["served"]["ece_debiased"])
    text = (tmp_path / "docs/evidence/ece.md").read_text()
    assert f"| MCC | {report['calibrated']['served']['mcc']:.4f} |" in text
    assert cli.main([*arguments, "--images", "0"]) == 2
