"""Phase 4a, did adaptation help? Linear probes before and after: `python -m stages.probe`."""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.core.artifacts import read_json, write_json_atomic


def probe(stage: Stage) -> None:
    """Fit probes on TRAIN without its fusion part, read them on VAL_SELECT → `metrics/probe.json`."""
    from streetvision.data.store import open_split
    from streetvision.explora.probe import probe_backbones

    params, paths = stage.params, stage.paths
    inputs = {name: paths.split(name) for name in ("train", "val_select")}
    splits = {name: open_split("probe", name, path) for name, path in inputs.items()}
    adapted = paths.explora / "backbone.safetensors"
    report = probe_backbones(
        params.train, params.probe, splits["train"], splits["val_select"], adapted,
        str(read_json(paths.explora / "config.json", "explora")["method"]),
        seed=params.seed, root=paths.root, batch_size=params.embed.batch_size,
        device=params.hardware.device,
    )  # fmt: skip
    write_json_atomic(paths.metric("probe"), report)
    stage.write_manifest(
        stage.config(), [paths.explora, *inputs.values()], [paths.metric("probe")],
        {"mcc": report["difference"]["mcc"]},
    )  # fmt: skip


if __name__ == "__main__":
    run_stage("probe", __doc__, probe)
