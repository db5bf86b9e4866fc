"""The stages of training, and the manager that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_core.trainers.manager import UlyssesTrainingManager

__all__ = ["UlyssesTrainingManager"]


def __getattr__(name: str) -> Any:
    """Imports the manager when it is asked for: checking a config needs no torch."""
    if name != "UlyssesTrainingManager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ulysses_core.trainers.manager import UlyssesTrainingManager

    return UlyssesTrainingManager
