"""Rotary embeddings whose frequencies depend on the longest position of the batch.

A rank sees the positions of its slice only. `dynamic` and `longrope` choose their frequencies by
the largest of them, so each rank is given the whole rows' largest position as one more column.

Legend: B rows, s tokens of a slice, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ulysses_monitor.common.patching import Undo, undo_all

__all__ = ["WholePositions"]

_ADAPTIVE = ("dynamic", "longrope")


class WholePositions:
    """Hooks on the rotary embeddings of a model that depend on the longest position.

    Attributes:
        last: the largest position of the whole rows, a scalar; None leaves the embeddings alone.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def hook(self, model: nn.Module) -> Undo:
        """Adds the hooks to `model`; returns a function that removes them."""
        undos: list[Undo] = []
        for module in model.modules():
            if _is_adaptive(module):
                undos.append(
                    module.register_forward_pre_hook(self._append, with_kwargs=True).remove
                )
                undos.append(module.register_forward_hook(self._drop).remove)
        return lambda: undo_all(undos)

    def _append(
        self,
        module: nn.Module,  # noqa: ARG002 - torch fixes the signatures of hooks
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Appends the largest position to the positions [B, s]."""
        if self.last is None:
            return None
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": _extend(kwargs["position_ids"], self.last)}
        hidden, positions, *rest = args
        return (hidden, _extend(positions, self.last), *rest), kwargs

    def _drop(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        """Drops the appended column of cosines and sines, or of complex numbers [B, s + 1, D]."""
        if self.last is None:
            return output
        return output[:, :-1] if isinstance(output, Tensor) else tuple(p[:, :-1] for p in output)


def _extend(positions: Tensor, last: Tensor) -> Tensor:
    return torch.cat([positions, last.to(positions).expand(len(positions), 1)], dim=1)


def _is_adaptive(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(name, str) and name.endswith(_ADAPTIVE) for name in names)
