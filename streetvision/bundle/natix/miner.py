"""A miner's loop without the chain: payloads in, answers out, a JSON line each.

Reads a challenge as the subnet's `neurons/miner.py` does: base64, `Image.open`, the registered detector; after
any error the prediction stays -1, no answer. It is run as a program of its own, also on another Python than
StreetVision's: `python -I miner.py CHECKOUT IMAGE_DETECTOR IMAGE_DETECTOR_CONFIG DEVICE`.
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
ABSENT = ("streetvision", "stages", "scipy", "sklearn", "pydantic", "pyarrow", "lightning", "peft")


def main() -> None:
    """Load the detector, say so, then answer every line on standard input."""
    checkout, name, config, device = sys.argv[1:]
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
    from base_miner.registry import DETECTOR_REGISTRY

    import_module("base_miner.detectors")  # registers them
    detector = DETECTOR_REGISTRY[name](config_name=config, device=device)
    versions = {module.__name__: module.__version__ for module in (torch, timm, np, PIL)}
    say(
        {
            "versions": {"Python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - started,
        }
    )
    for line in sys.stdin.buffer:
        say({**answer(detector, line), "peak_mib": peak_mib()})


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
