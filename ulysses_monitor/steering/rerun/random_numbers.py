"""The state of the random numbers that a training draws: kept, and put back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomState"]


@dataclass(frozen=True)
class RandomState:
    """The state of Python's, NumPy's and torch's global generators.

    Attributes:
        python: of `random`.
        numpy: of NumPy's global generator.
        host: of torch's generator on the host.
        gpu: of torch's generator on a GPU, if there is one; kept on the host.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    host: Tensor
    gpu: Tensor | None

    @classmethod
    def take(cls, device: torch.device) -> RandomState:
        """Returns the state as it is now, without making the host wait for a GPU.

        Args:
            device: the GPU whose generator is meant; nothing more where it is none.
        """
        of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the user's code draws from it
        return cls(random.getstate(), numpy, torch.get_rng_state(), of_device)

    def restore(self, device: torch.device) -> None:
        """Puts the state back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - likewise
        torch.set_rng_state(self.host)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)

    @property
    def size(self) -> int:
        """Bytes, about."""
        return 2500 * 2 + sum(t.numel() for t in (self.host, self.gpu) if t is not None)
