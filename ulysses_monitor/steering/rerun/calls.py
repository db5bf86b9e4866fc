"""Keeps what the calls of a step need to be made again: inputs, random state, buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulysses_monitor.common.again import is_computing_again
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.steering.rerun.buffers import Buffers
from ulysses_monitor.steering.rerun.random_numbers import RandomState
from ulysses_monitor.steering.rerun.results import Result, find_results

__all__ = ["Call", "Calls"]


@dataclass
class Call:
    """One call of the model that is trained on.

    Attributes:
        args: its arguments; tensors are not copied.
        kwargs: likewise, by name.
        random: the state of the random numbers before it.
        autocast: whether it ran under autocast, and with which type.
        versions: the inputs, and how often each had been changed in place.
        results: what it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    autocast: tuple[bool, torch.dtype]
    versions: list[tuple[Tensor, int]]
    results: list[Result] = field(default_factory=list)

    def again(self, model: nn.Module, device: torch.device) -> list[Tensor]:
        """Makes the call again, with the random numbers that it drew; returns its results.

        Raises:
            RuntimeError: an input was changed in place since, or the results are others in number.
        """
        if any(tensor._version != version for tensor, version in self.versions):
            raise RuntimeError("an input of the model was changed in place after the call")
        self.random.restore(device)
        enabled, dtype = self.autocast
        context: AbstractContextManager[Any] = torch.autocast(
            device.type, dtype=dtype, enabled=enabled
        )
        with torch.enable_grad(), context:
            found = find_results(model(*self.args, **self.kwargs))
        if len(found) != len(self.results):
            raise RuntimeError("the model returned something else than the first time")
        return found

    @property
    def size(self) -> int:
        """Bytes that are kept of it."""
        tensors = [t for t, _ in self.versions] + [r.value for r in self.results]
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        return sum(unique.values()) + self.random.size


class Calls:
    """Keeps the calls of a step until it is read.

    Args:
        model: the user's model, without wrappers.
        device: where it is.
        guard: calls what keeps them.

    Attributes:
        kept: the calls of the step so far.
        buffers: the model's buffers before the first of them.
        problem: why the step cannot be computed again; empty if it can.
    """

    def __init__(self, model: nn.Module, device: torch.device, guard: Guard) -> None:
        self._model, self._device, self._guard = model, device, guard
        self.kept: list[Call] = []
        self.buffers: Buffers | None = None
        self.problem = ""
        before = model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        after = model.register_forward_hook(self._leave, with_kwargs=True)
        self._handles = [before, after]

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self.forget()

    def forget(self) -> None:
        """Lets go of the calls of a step."""
        self.kept, self.buffers, self.problem = [], None, ""

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_trained(module):
            self._guard.call("keeping a step", lambda: self._keep(args, kwargs), None)

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.problem = "a call of the model could not be kept"  # until it has been
        if not self.kept:
            self.buffers = Buffers.of(self._model)
        kind = self._device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        versions = [(tensor, tensor._version) for tensor in _tensors_in((args, kwargs))]
        random = RandomState.take(self._device)
        self.kept.append(Call(args, dict(kwargs), random, autocast, versions))

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        del args, kwargs
        if _is_trained(module):
            self._guard.call("keeping a step", lambda: self._note(output), None)

    def _note(self, output: Any) -> None:
        found = find_results(output)
        self.kept[-1].results = [Result(tensor) for tensor in found]
        self.problem = (
            "" if found else ("the model returned no loss, and too much to keep all of it")
        )

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        buffers = 0 if self.buffers is None else self.buffers.size
        return buffers + sum(call.size for call in self.kept)


def _is_trained(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not is_computing_again()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors_in(each)
