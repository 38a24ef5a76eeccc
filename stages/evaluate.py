"""The final report on VAL_TEST, through the bundle: `python -m stages.evaluate`."""

from __future__ import annotations

from stages.common import Stage, run_stage


def evaluate(stage: Stage) -> None:
    """Bundle and VAL_TEST → `metrics/evaluation.json`, plots and `predictions.csv`."""
    from streetvision.bundle.predictor import Predictor
    from streetvision.data.store import open_split
    from streetvision.evaluation.evaluate import evaluate_split, write_evaluation

    params, paths = stage.params, stage.paths
    source = paths.split("val_test")
    predictor = Predictor.load(paths.bundle, params.hardware.device)
    split = open_split("evaluate", "val_test", source)
    evaluation = evaluate_split(
        predictor, split, params.decision.served_prior,
        n_resamples=params.evaluate.n_resamples, mistakes=params.evaluate.mistakes,
        seed=params.seed,
    )  # fmt: skip
    written = write_evaluation(evaluation, paths.metric("evaluation"), paths.metrics / "plots")
    metrics = {key: evaluation.report[key] for key in ("mcc", "ece")}
    config = stage.config()
    stage.write_manifest(config, [paths.bundle, source], written, metrics)


if __name__ == "__main__":
    run_stage("evaluate", __doc__, evaluate)
