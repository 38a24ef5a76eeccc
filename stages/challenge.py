"""What the subnet would pay: VAL_TEST as its validators send it: `python -m stages.challenge`."""

from __future__ import annotations

from stages.common import Stage, run_stage


def challenge(stage: Stage) -> None:
    """Bundle, VAL_TEST and its original files → `metrics/challenge.json` and its plots."""
    from streetvision.bundle.predictor import Predictor
    from streetvision.data.store import open_originals, open_split
    from streetvision.evaluation.challenge import challenge_split, write_challenge

    params, paths = stage.params, stage.paths
    source, files = paths.split("val_test"), paths.originals
    predictor = Predictor.load(paths.bundle, params.hardware.device)
    split = open_split("challenge", "val_test", source)
    found = challenge_split(
        predictor, split, open_originals("challenge", files), params.subnet, params.challenge,
        params.decision.served_prior,
        seed=params.seed, workers=params.hardware.workers,
    )  # fmt: skip
    written = write_challenge(found, paths.metric("challenge"), paths.metrics / "plots")
    metrics = {"mcc": found.report["mcc"], "reward": found.report["reward"]["mean"]}
    stage.write_manifest(stage.config(), [paths.bundle, source, files], written, metrics)


if __name__ == "__main__":
    run_stage("challenge", __doc__, challenge)
