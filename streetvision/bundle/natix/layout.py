"""Where a checkout of the subnet's repository keeps the miner's detectors: it moved with v0.4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streetvision.core.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The miner's Python package in some releases of the subnet; below it, all is named alike in each."""

    package: str
    releases: str

    @property
    def folder(self) -> str:
        """The package's folder in the checkout."""
        return self.package.replace(".", "/")

    @property
    def detectors(self) -> str:
        """The folder of the detectors, relative to the checkout."""
        return f"{self.folder}/detectors"

    @property
    def needed(self) -> tuple[str, ...]:
        """What a detector is written beside or builds on."""
        return (
            f"{self.folder}/registry.py", f"{self.detectors}/__init__.py",
            f"{self.detectors}/feature_detector.py", f"{self.detectors}/configs",
        )  # fmt: skip

    def missing(self, checkout: Path) -> list[str]:
        """Return what of that a checkout lacks."""
        return [name for name in self.needed if not (checkout / name).exists()]

    def __str__(self) -> str:
        return f"{self.folder} ({self.releases})"


LAYOUTS = (Layout("natix.miner", "v0.4 and later"), Layout("base_miner", "before v0.4"))


def layout_of(checkout: Path) -> Layout:
    """Return the layout of a checkout.

    Raises
    ------
    UserError
        It has none of the layouts whole, or several: which one the miner imports is then not known.
    """
    found = [layout for layout in LAYOUTS if not layout.missing(checkout)]
    if len(found) > 1:
        raise UserError(
            f"{checkout} has {' and '.join(map(str, found))}: move away the one that its "
            "neurons/miner.py does not import"
        )
    if found:
        return found[0]
    if not checkout.is_dir():
        raise UserError(f"{checkout} is no checkout of the subnet: it is no folder")
    nearest = min(LAYOUTS, key=lambda layout: len(layout.missing(checkout)))
    missing = nearest.missing(checkout)
    lacks = f"no {', '.join(missing)}"
    if len(missing) == len(nearest.needed):
        lacks = f"neither {' nor '.join(map(str, LAYOUTS))}"
    raise UserError(f"{checkout} is no checkout of the subnet: it has {lacks}")
