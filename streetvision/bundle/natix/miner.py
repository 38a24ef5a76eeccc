"""A miner's loop without the chain: payloads in, answers out, a JSON line each.

Reads a challenge as the subnet's `neurons/miner.py` does: base64, `Image.open`, the registered detector; after
any error the prediction stays -1, no answer. It is run as a program of its own, also on another Python than
StreetVision's: `python -I miner.py CHECKOUT PACKAGE IMAGE_DETECTOR IMAGE_DETECTOR_CONFIG DEVICE`. PACKAGE is
`natix.miner` or, before v0.4, `base_miner`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import resource
import sys
import time
from importlib import import_module
from typing import Any

# What StreetVision has and a miner may lack: the detector must do without.
ABSENT = (
    "streetvision", "stages", "scipy", "sklearn", "pydantic", "pyarrow", "lightning", "peft",
    "transformers", "cv2",
)  # fmt: skip


def main() -> None:
    """Load the detector, say so, then answer every line on standard input."""
    checkout, package, name, config, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the subnet's classes print

    def say(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    for module in ABSENT:
        sys.modules[module] = None  # type: ignore[assignment]
    sys.path.insert(0, checkout)
    started = time.perf_counter()
    import numpy as np
    import PIL
    import timm
    import torch

    import_module(f"{package}.detectors")  # registers them
    registry = import_module(f"{package}.registry").DETECTOR_REGISTRY
    detector = registry[name](config_name=config, device=device)
    detector.decoded = decoding = Timed(detector.decoded)
    versions = {module.__name__: module.__version__ for module in (torch, timm, np, PIL)}
    say(
        {
            "versions": {"Python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - started,
        }
    )
    for line in sys.stdin.buffer:
        decoding.seconds = 0.0
        answered = answer(detector, line)
        say({**answered, "decoding": decoding.seconds, "peak_mib": peak_mib()})


class Timed:
    """A function that counts the seconds it takes."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        started = time.perf_counter()
        try:
            return self.function(*arguments)
        finally:
            self.seconds += time.perf_counter() - started


def answer(detector: Any, payload: bytes) -> dict[str, Any]:
    """Return `prediction`, -1 without an answer, and `error`, empty with one."""
    from PIL import Image

    try:
        data = base64.b64decode(json.loads(payload)["image"])
        with Image.open(io.BytesIO(data)) as image:
            return {"prediction": detector(image), "error": ""}
    except Exception as error:
        text = " ".join(str(error).split())
        return {"prediction": -1.0, "error": f"{type(error).__name__}: {text}"[:200]}


def peak_mib() -> int:
    """Return the most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    main()
