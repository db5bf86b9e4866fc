"""How a fault is declared: a function that breaks one thing of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.faults.training import Training

__all__ = ["ANY", "BLOWN_UP", "FAULTS", "ONSET", "Fault", "fault"]

ONSET = 60
"""Step at which faults that come later begin."""

ANY = ("adamw", "sgd", "lora", "dpo")


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: its name.
        breaks: changes a training.
        onset: first step that it shows at.
        names: rules that name the cause.
        fits: kinds of trainings that it can be put into.
    """

    name: str
    breaks: Callable[[Training], None]
    onset: int
    names: tuple[str, ...]
    fits: tuple[str, ...]


FAULTS: dict[str, Fault] = {}

BLOWN_UP = (
    *("divergence", "loss_spike", "gradient_spike", "exploding_gradient", "update_ratio_large"),
    *("nonfinite", "early_gradient", "early_update", "exploding_layer", "layer_shift"),
    *("chosen_falls", "preference_margin_runaway", "rate_out_of_range", "lora_outgrows_base"),
)


def fault(
    *names: str, onset: int = 1, fits: tuple[str, ...] = ("adamw", "sgd", "lora")
) -> Callable[[Callable[[Training], None]], Callable[[Training], None]]:
    """Declares a fault.

    Args:
        names: rules that name its cause.
        onset: first step that it shows at.
        fits: kinds of trainings that it can be put into.
    """

    def declare(breaks: Callable[[Training], None]) -> Callable[[Training], None]:
        name = breaks.__name__
        FAULTS[name] = Fault(name, breaks, onset, names, fits)
        return breaks

    return declare
