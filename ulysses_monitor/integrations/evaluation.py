"""Whether an evaluation draws random numbers, as dropout does that is not switched off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomDraws", "draws_on_purpose"]


class RandomDraws:
    """Counts the steps of an evaluation in which torch's random state moved on."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._steps = self._drew = 0

    def see(self, device: torch.device) -> None:
        """Looks at the random state of `device` after a step of an evaluation; does not wait."""
        state = _random_state(device)
        if self._last is not None:
            self._steps += 1
            self._drew += not torch.equal(state, self._last)
        self._last = state

    def take(self) -> dict[str, float]:
        """Returns the share of the evaluation's steps, if it had more than one; starts anew."""
        share = {"eval/random_steps/total": self._drew / self._steps} if self._steps else {}
        self._last = None
        self._steps = self._drew = 0
        return share


def draws_on_purpose(trainer: Any) -> bool:
    """Whether a Trainer's evaluation samples answers, or a collator masks words at random."""
    args = trainer.args
    return (
        hasattr(trainer, "generation_config")
        or bool(getattr(args, "predict_with_generate", False))
        or bool(getattr(args, "generate_during_eval", False))
        or bool(getattr(trainer.data_collator, "mlm", False))
    )


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
