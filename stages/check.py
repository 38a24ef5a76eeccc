"""Parameters with a wrong name or value stop every run before it begins: `python -m stages.check`.

DVC tells a stage from its parameters' names, so a name that no stage has reruns nothing and is no error to it.
"""

from __future__ import annotations

from stages.common import Stage, run_stage
from streetvision.core.artifacts import write_bytes_atomic


def check(stage: Stage) -> None:
    """`params.yaml` → `data/params.checked`, on which `ingest` and so every stage depends.

    `run_stage` has read the parameters when this begins. The file's bytes are always the same: nothing after
    this stage reruns because of it.
    """
    write_bytes_atomic(
        stage.paths.checked, b"params.yaml has known parameters with allowed values.\n"
    )


if __name__ == "__main__":
    run_stage("check", __doc__, check)
