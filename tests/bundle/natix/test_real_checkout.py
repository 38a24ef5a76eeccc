"""The installed detector in the subnet's own code: its miner answers, its validator asks and pays.

None of that code is in this repository. NATIX_CHECKOUTS names checkouts (several like PATH), MINER_PYTHON an
interpreter with what they import (`make compat` makes both eras'); bittensor is a stand-in.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from streetvision.bundle.natix.check import challenge_image
from streetvision.bundle.natix.install import CONFIG, NAME, install
from streetvision.bundle.natix.layout import layout_of
from streetvision.bundle.predictor import Predictor
from streetvision.subnet.reward import rewards

if TYPE_CHECKING:
    from tests.conftest import Trained

CHECKOUTS = [path for path in os.environ.get("NATIX_CHECKOUTS", "").split(os.pathsep) if path]
MINER_PYTHON = os.environ.get("MINER_PYTHON", sys.executable)
TOLERANCE = 1e-6 if sys.executable == MINER_PYTHON else 2e-3
PROGRAM = Path(__file__).parents[2] / "compat/real_miner.py"
COUNT = 24
LARGE = (4032, 3024)


def cache(folder: Path) -> Path:
    """Pictures and labels as a validator keeps them: one of each label is a phone's."""
    folder.mkdir()
    for number in range(8):
        size = LARGE if number < 2 else (640, 480)
        (folder / f"{number}.jpg").write_bytes(challenge_image(number, size))
        label = number % 2
        document = {"label": label, "scene_description": "a cone" if label else ""}
        (folder / f"{number}.json").write_text(json.dumps(document))
    return folder


@pytest.mark.skipif(not CHECKOUTS, reason="NATIX_CHECKOUTS names no checkout of the subnet")
@pytest.mark.parametrize("source", CHECKOUTS)
def test_the_subnets_own_miner_and_validator(source: str, trained: Trained, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", "__pycache__", "streetvision*", "StreetVision*")
    shutil.copytree(source, checkout, ignore=ignored)
    layout = layout_of(checkout)
    install(trained.bundle, checkout)
    command = [MINER_PYTHON, "-I", str(PROGRAM), str(checkout), layout.package, NAME, CONFIG]
    done = subprocess.run(
        [*command, str(cache(tmp_path / "cache")), str(COUNT)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error: Error performing inference" not in done.stderr
    document = json.loads(done.stdout)
    assert document["detector"] == "StreetVisionDetector"
    assert document["axon"]
    found = document["challenges"]
    if not found:
        pytest.skip("the miner starts; this checkout's validator asks nobody")
    assert len(found) == COUNT
    predictor = Predictor.load(trained.bundle, "cpu")
    sent = [base64.b64decode(one["image"]) for one in found]
    answers = np.array([one["prediction"] for one in found])
    expected = [predictor(data) for data in sent]
    np.testing.assert_allclose(answers, expected, rtol=0, atol=TOLERANCE)
    assert max(one["seconds"] for one in found) < found[0]["timeout"] == 9
    paid = [one["reward"] for one in found]
    labels = [one["label"] for one in found]
    np.testing.assert_allclose(paid, rewards(answers, labels), rtol=0, atol=1e-9)
    sizes = {Image.open(io.BytesIO(data)).size for data in sent}
    print(
        f"{layout}: sizes {sizes}, answers {answers.min():.4f} to {answers.max():.4f}, paid {paid[-1]:.4f}"
    )
    # Until v0.4.1 all was resized for the network.
    assert sizes in ({(224, 224)}, {LARGE, (640, 480)})
