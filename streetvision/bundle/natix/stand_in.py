"""A folder that looks to the detector like a checkout of the subnet, for running it without one.

It keeps to the interface that the public repository has in both layouts (natixnetwork/streetvision-subnet,
commit 28a1755, and its later history up to 5d0756b): a registry of detector classes, and a base class that
takes attributes from a YAML file and then loads.
"""

from __future__ import annotations

from pathlib import Path

from streetvision.bundle.natix.layout import LAYOUTS, Layout

# Below the miner's package.
FILES = {
    "__init__.py": "",
    "registry.py": """
class Registry:
    def __init__(self):
        self.data = {}

    def register_module(self, module_name):
        def register(cls):
            self.data[module_name] = cls
            return cls

        return register

    def __getitem__(self, name):
        return self.data[name]

    def __contains__(self, name):
        return name in self.data


DETECTOR_REGISTRY = Registry()
""",
    "detectors/__init__.py": "from .feature_detector import FeatureDetector\n",
    "detectors/configs/constants.py": "",
    "detectors/feature_detector.py": '''
from abc import ABC, abstractmethod
from pathlib import Path

import torch
import yaml

CONFIGS = Path(__file__).resolve().parent / "configs"


class FeatureDetector(ABC):
    def __init__(self, model_name, config_name=None, device="cpu"):
        self.model_name = model_name
        on_gpu = device == "cuda" and torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if config_name:
            print("Configuring with", config_name)
            for name, value in yaml.safe_load((CONFIGS / config_name).read_text()).items():
                setattr(self, name, value)
            self.config = yaml.safe_load((CONFIGS / self.config_name).read_text())
        self.load_model()

    @abstractmethod
    def load_model(self):
        """Load what the attributes name."""

    @abstractmethod
    def __call__(self, image):
        """Return the probability of roadwork."""
''',
}


def make_checkout(folder: Path, layout: Layout = LAYOUTS[0]) -> Path:
    """Write the stand-in below `folder` and return that."""
    package = folder / layout.folder
    for name, text in FILES.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
