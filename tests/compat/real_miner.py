"""The subnet's own miner, started in a checkout, and asked and paid by the functions of its own validator.

`python -I real_miner.py CHECKOUT PACKAGE DETECTOR CONFIG PICTURES COUNT`: PACKAGE is `natix.miner` or
`base_miner`, PICTURES a folder as the validator's cache has it (`name.jpg`, and `name.json` with the label).
Only bittensor, wandb and diffusers are stand-ins (`stubs/`), and nothing reaches a network: no statistics,
and NATIX's own tasks come from PICTURES, too. Prints one JSON document.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main() -> None:
    """Start the miner, let the validator ask COUNT times, print what was sent, answered and paid."""
    checkout, package, detector, settings, pictures, count = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the subnet's classes print
    sys.path[:0] = [str(Path(__file__).with_name("stubs")), checkout]
    sys.argv[1:] = [
        "--neuron.image_detector", detector, "--neuron.image_detector_config", settings,
        "--neuron.image_detector_device", "cpu", "--wandb.off", "--neuron.dont_save_events",
    ]  # fmt: skip
    neuron = "natix.miner.neuron" if package == "natix.miner" else "neurons.miner"
    miner = import_module(neuron).Miner()
    with miner:  # its own loop, in a thread
        deadline = time.monotonic() + 30
        while not miner.axon.started and time.monotonic() < deadline:
            time.sleep(0.01)
        found = asyncio.run(challenges(miner, Path(pictures), int(count)))
    document = {
        "detector": type(miner.image_detector).__name__, "axon": miner.axon.attached != {},
        "challenges": found,
    }  # fmt: skip
    json.dump(document, answers)
    answers.flush()


async def challenges(miner: Any, pictures: Path, count: int) -> list[dict[str, Any]]:
    """Let the validator's own `forward` make, send and score challenges."""
    import numpy as np

    forward = import_module("natix.validator.forward")
    scoring = "scoring.performance_tracker"
    if find_spec("natix.validator.scoring") is None:
        scoring = "miner_performance_tracker"
    tracker = import_module(f"natix.validator.{scoring}").MinerPerformanceTracker()
    cache = import_module("natix.validator.cache").ImageCache(pictures)
    found: list[dict[str, Any]] = []

    async def send(axons: Any, synapse: Any, deserialize: bool, timeout: float) -> list[Any]:
        wire = synapse.model_dump_json()
        received = type(synapse).model_validate_json(wire)
        received.dendrite = SimpleNamespace(hotkey="5Validator")
        refused, reason = await miner.axon.attached["blacklist_fn"](received)
        assert not refused, reason
        started = time.perf_counter()
        answered = await miner.axon.attached["forward_fn"](received)
        seconds = time.perf_counter() - started
        image = received.image.encode() if isinstance(received.image, str) else received.image
        base64.b64decode(image, validate=True)
        found.append(
            {
                "image": image.decode(),
                "prediction": answered.prediction,
                "seconds": seconds,
                "timeout": timeout,
            }
        )
        return [answered]

    def score(rewards: Any, uids: Any) -> None:
        found[-1]["reward"] = float(rewards[0])

    async def own_task(validator: Any, label: int) -> dict[str, Any]:
        return {**cache.sample(label), "label": int(label), "task_id": "0"}

    forward.fetch_api_challenge = own_task
    for name in [name for name in vars(forward) if name.startswith("statistics_")]:
        setattr(forward, name, lambda *_, **__: {"id": "0"})
    rewards, labels = forward.get_rewards, []

    def paid(label: Any, **others: Any) -> Any:
        labels.append(int(label))
        return rewards(label=label, **others)

    forward.get_rewards = paid
    nothing = SimpleNamespace(off=True)
    validator = SimpleNamespace(
        media_cache={"Roadwork": {"image": cache}},
        synthetic_media_cache={"image": {"i2i": cache, "t2i": cache}},
        _fake_prob=0.5, metagraph=miner.metagraph, dendrite=send, update_scores=score, scores=[0.0],
        performance_trackers={"image": tracker}, save_miner_history=lambda: None,
        uid_deck=SimpleNamespace(next_k=lambda **_: [miner.uid]),
        config=SimpleNamespace(
            wandb=nothing, neuron=SimpleNamespace(sample_size=1, vpermit_tao_limit=40_096)
        ),
    )  # fmt: skip
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the validator draws from it)
    for _ in range(count):
        await forward.forward(validator)
    for one, label in zip(found, labels, strict=True):
        one["label"] = label
    return found


if __name__ == "__main__":
    main()
