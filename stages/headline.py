"""The dozen numbers that DVC's tables show: `python -m stages.headline`."""

from __future__ import annotations

import logging

from stages.common import Stage, run_stage
from streetvision.core.artifacts import read_json, write_json_atomic
from streetvision.evaluation.headline import headline_of, in_words

log = logging.getLogger(__name__)


def headline(stage: Stage) -> None:
    """`metrics/{train,evaluation,challenge}.json` → `metrics/headline.json`, said in one line, too."""
    paths = stage.paths
    sources = {"train": "train", "evaluation": "evaluate", "challenge": "challenge"}
    found = headline_of(**{name: read_json(paths.metric(name), by) for name, by in sources.items()})
    log.info(in_words(found))
    written = write_json_atomic(paths.metric("headline"), found, sort_keys=False)
    inputs = [paths.metric(name) for name in sources]
    stage.write_manifest(stage.config(), inputs, [written], found)


if __name__ == "__main__":
    run_stage("headline", __doc__, headline)
