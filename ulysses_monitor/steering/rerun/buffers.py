"""The buffers of a model, such as the averages of BatchNorm: kept, and put back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Buffers"]

_Held = tuple[nn.Module, str, Tensor, Tensor]
"""Module, name, the tensor itself, and a copy."""


@dataclass(frozen=True)
class Buffers:
    """The buffers of a model as they were."""

    held: list[_Held]

    @classmethod
    def of(cls, model: nn.Module) -> Buffers:
        """Copies all buffers."""
        return cls(
            [
                (module, name, buffer, buffer.detach().clone())
                for module in model.modules()
                for name, buffer in module._buffers.items()
                if buffer is not None
            ]
        )

    def restore(self) -> None:
        """Puts every buffer back, whether it was changed in place or replaced by another tensor.

        BatchNorm changes its averages without a word in `Tensor._version`. Nor do we: a graph that
        the training keeps may hold a buffer.
        """
        for module, name, buffer, copy in self.held:
            buffer.data.copy_(copy)
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer

    @property
    def size(self) -> int:
        """Bytes of the copies."""
        return sum(copy.numel() * copy.element_size() for *_, copy in self.held)
