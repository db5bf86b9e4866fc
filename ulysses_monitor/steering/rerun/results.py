"""What a call of the model returned, and the gradient that came back to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Result", "find_results", "same_bits"]

_MOST_VALUES = 1 << 24
"""Values of a call without a loss that are kept until the step is read."""


class Result:
    """A tensor that the model returned.

    Args:
        tensor: it; a hook on it notes the gradient, which includes every factor between it and the
            loss that is differentiated: accumulation, averages, the loss scale.

    Attributes:
        value: the tensor without its graph.
        gradient: what came back; None until then, or if the loss does not depend on it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.value = tensor.detach().clone() if tensor.numel() == 1 else tensor.detach()
        self.gradient: Tensor | None = None
        tensor.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        known = self.gradient
        self.gradient = gradient.detach().clone() if known is None else known + gradient.detach()


def find_results(output: Any) -> list[Tensor]:
    """Returns the loss that a call returned or, without one, all that it returned.

    Args:
        output: of the call.

    Returns:
        Tensors that require a gradient; none if there are none, or too many values.
    """
    if isinstance(output, Mapping) and isinstance(loss := output.get("loss"), Tensor):
        found = [loss]
    else:
        found = list(_tensors_in(output))
        if found and isinstance(output, tuple | list) and found[0].numel() == 1:
            found = found[:1]
    found = [tensor for tensor in found if tensor.requires_grad and tensor.grad_fn is not None]
    return found if sum(t.numel() for t in found) <= _MOST_VALUES else []


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors_in(value)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    return torch.equal(one.nan_to_num(nan=0.0), other.nan_to_num(nan=0.0)) and torch.equal(
        one.isnan(), other.isnan()
    )
