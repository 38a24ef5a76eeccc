"""The deployable bundle, its validator and its predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streetvision.bundle.predictor import Predictor
    from streetvision.bundle.validate import BundleValidator

__all__ = ["BundleValidator", "Predictor"]


def __getattr__(name: str) -> Any:
    """Import `Predictor`, and with it torch, when it is asked for."""
    if name == "Predictor":
        from streetvision.bundle.predictor import Predictor

        return Predictor
    if name == "BundleValidator":
        from streetvision.bundle.validate import BundleValidator

        return BundleValidator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
