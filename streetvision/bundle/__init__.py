"""The deployable bundle and its predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streetvision.bundle.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    """Import `Predictor`, and with it torch, when it is asked for."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streetvision.bundle.predictor import Predictor

    return Predictor
