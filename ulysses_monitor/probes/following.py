"""Follows a training that trains other parameters from some step on.

BAdam, LISA and gradual unfreezing change ``requires_grad`` while they train; others change the
optimizer's groups. The ranks must change what they read at the same step, because the length of the
step's vector depends on it. So the vector tells: each rank that sees a change adds 1 and
fingerprints of what it trains now. Where all ranks see the same change, all build their probes anew
and read the step again. Where they do not, or an engine does not train what became trainable, the
step has no metrics.

A fingerprint is a small integer h. W * sum(h^2) = sum(h)^2 over W ranks only if all h are equal.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.common.ranks import rank, world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.engines.support import strip_wrappers
from ulysses_monitor.probes.assembly import assemble, find_expert_adapters
from ulysses_monitor.probes.base import Probe
from ulysses_monitor.probes.capture import Capture, CapturedStep
from ulysses_monitor.probes.consistency import fingerprint
from ulysses_monitor.probes.modules import ModuleProbe, Surroundings

__all__ = ["FollowingCapture"]

logger = logging.getLogger(__name__)

Report = Callable[[str, Mapping[str, Any]], None]

_CHANGED, _REFUSED, _SET, _GRADS = "changed", "refused", "set", "gradients"

_RANKS_DIFFER = "the ranks train different parameters; expected the same requires_grad on all ranks"
_NOT_REDUCED = (
    "the ranks have different gradients of the parameters that became trainable, so each rank "
    "trains them apart: DistributedDataParallel reduces only what is trainable when it is made; "
    "expected every parameter that is ever trained to be trainable then"
)


_EXPERTS = (
    "PEFT's target_parameters keeps the adapters of all experts of a module in one A and one B; "
    "gradients, parameters and updates are recorded under param/"
)


@dataclass(frozen=True)
class _Change:
    """What this rank sees of a change.

    Attributes:
        trained: names and sizes of the parameters that are trained now; None if they are those
            that are read.
        gradients: fingerprint of the gradients that must be the same on all ranks, of parameters
            that became trainable.
        refusal: why the engine does not train them.
    """

    trained: list[tuple[str, int]] | None = None
    gradients: Tensor | float = 0.0
    refusal: str | None = None

    def sums(self) -> dict[str, Tensor | float]:
        """Returns what the vector carries."""
        is_changed = self.trained is not None
        own = float(zlib.crc32(repr(self.trained).encode())) if is_changed else 0.0
        sums: dict[str, Tensor | float] = {
            _CHANGED: float(is_changed),
            _REFUSED: float(self.refusal is not None),
        }
        for name, h in ((_SET, own), (_GRADS, self.gradients)):
            h = h % (2**26 // world_size())  # W * h < 2^26: its square is exact in float64
            sums |= {name: h, f"{name} squared": h * h}
        return sums


class FollowingCapture:
    """A `Capture` of the parameters that are trained, whichever they are at a step.

    Every rank must make one, at the same time.

    Args:
        engine: the engine to read.
        sample_every: see `Capture`.
        next_step: returns the number of the coming step.
        guard: switches off probes that keep failing.
        report: records an event: its kind, and what happened.
        more: probes beside those that fit the engine.
        makers: make the probes that the user asked for.
    """

    def __init__(
        self,
        engine: Engine,
        sample_every: int,
        next_step: Callable[[], int],
        guard: Guard,
        report: Report,
        more: Sequence[Probe] = (),
        makers: Sequence[Callable[[Surroundings], ModuleProbe]] = (),
    ) -> None:
        self._engine, self._sample_every = engine, sample_every
        self._next_step, self._guard, self._report = next_step, guard, report
        around = Surroundings(engine, next_step, self._is_sampled, guard, report)
        self._on_request = [make(around) for make in makers]
        self._more = [*more, *self._on_request]
        self._capture, self._undos = self._assemble()
        self._told: str | None = None
        self._has_warned = False

    def _assemble(self) -> tuple[Capture, list[Undo]]:
        return assemble(
            self._engine, self._sample_every, self._next_is_sampled, self._guard, self._more
        )

    def _next_is_sampled(self) -> bool:
        return self._capture.is_sampled(self._next_step())

    def _is_sampled(self, step: int) -> bool:
        return self._capture.is_sampled(step)

    def announce(self) -> None:
        """Records what is left out from the start; called when the run is open."""
        for probe in self._on_request:
            probe.announce()
        experts = sorted(find_expert_adapters(self._engine.model))
        if experts:
            about = {"adapters": "left out", "modules": experts, "reason": _EXPERTS}
            self._report("monitor", about)
            if rank() == 0:
                logger.warning("monitor: %s is left out of lora/*: %s", experts[0], _EXPERTS)

    def close(self) -> None:
        """Removes every hook."""
        undo_all(self._undos)
        for probe in self._on_request:
            probe.close()

    def names(self) -> set[str]:
        """See `Capture.names`."""
        return self._capture.names()

    def read(self, step: int, extra: Mapping[str, Tensor | float]) -> CapturedStep:
        """Reads one step, see `Capture.read`; it has no metrics if a change cannot be followed."""
        change = self._look()
        own = change.sums()
        first = self._capture.read(step, {**extra, **own}, _is_unchanged)
        sums = dict(first.extra)
        found = {name: sums.pop(name) for name in own}
        captured = replace(first, extra=sums)
        if _is_unchanged(found):
            self._told = None
        elif (reason := _find_obstacle(change, found)) is not None:
            self._tell(reason, step)
        else:
            self._follow(step)
            captured = replace(captured, parts=self._capture.read(step, {}).parts)
        return captured

    def finish_step(self, done: bool) -> None:
        """See `Capture.finish_step`."""
        self._capture.finish_step(done)

    def _look(self) -> _Change:
        """Looks at what is trained; no failure here keeps this rank from the collective."""
        try:
            trained = self._engine.find_change()
            if trained is None:
                return _Change()
            return _Change(trained, _fingerprint_added(self._engine, dict(trained)))
        except InputError as error:
            return _Change(refusal=str(error).removeprefix("monitor: "))
        except Exception as error:  # noqa: BLE001 - report_failure logs it
            self._guard.report_failure("looking for trainable parameters", error)
            return _Change(refusal=f"{type(error).__name__}: {error}")

    def _follow(self, step: int) -> None:
        """Reads other parameters from now on."""
        before = {name for name, _ in self._engine.parameters()}
        undo_all(self._undos)
        self._engine.follow()
        self._capture, self._undos = self._assemble()
        after = dict(self._engine.parameters())
        self._told = None
        about = {
            "first_step": step,
            "trained": len(after),
            "elements": sum(after.values()),
            "added": len(after.keys() - before),
            "removed": len(before - after.keys()),
        }
        self._report("monitor", {"parameters": "followed", **about})

    def _tell(self, reason: str, step: int) -> None:
        """Says once per change why steps have no metrics."""
        if reason == self._told:
            return
        self._told = reason
        if rank() == 0 and not self._has_warned:
            self._has_warned = True
            logger.warning("monitor: step %d and later have no metrics: %s", step, reason)
        about = {"parameters": "not followed", "first_step": step, "error": reason}
        self._report("monitor", about)


def _is_unchanged(sums: Mapping[str, float]) -> bool:
    return not (sums[_CHANGED] or sums[_REFUSED])


def _find_obstacle(change: _Change, sums: Mapping[str, float]) -> str | None:
    """Returns why the ranks cannot follow a change; None if they can. The same on all ranks."""
    if sums[_REFUSED]:
        return change.refusal or "another rank trains parameters that its engine does not train"
    if sums[_CHANGED] != world_size() or not _are_alike(_SET, sums):
        return _RANKS_DIFFER
    return None if _are_alike(_GRADS, sums) else _NOT_REDUCED


def _are_alike(name: str, sums: Mapping[str, float]) -> bool:
    return world_size() * sums[f"{name} squared"] == sums[name] ** 2


def _fingerprint_added(engine: Engine, trained: Mapping[str, int]) -> Tensor | float:
    """Returns a fingerprint of the gradients of parameters that became trainable.

    DDP does not say what it reduces. Gradients that it does not reduce differ between the ranks.
    """
    if not (engine.replica_sets and engine.replicates_gradients):
        return 0.0
    added = trained.keys() - {name for name, _ in engine.parameters()}
    prints = [
        fingerprint(param.grad)
        for name, param in engine.model.named_parameters()
        if strip_wrappers(name) in added and param.grad is not None
    ]
    return torch.stack(prints).sum() if prints else 0.0
