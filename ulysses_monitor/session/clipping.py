"""Sees what a plain loop does to the gradients of a step before the optimizer takes them.

A loop may clip with torch's own functions, with accelerate's, which call torch's, or by hand. The
norm that is recorded is the one before clipping, so a call of one of torch's functions with the
model's parameters is a moment to read. What a loop does by hand cannot be seen; it must call
`Monitor.before_clip`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from types import GeneratorType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo, patch_decorated, undo_all
from ulysses_monitor.engines import Engine, do_nothing

__all__ = ["Clipping"]

_T = TypeVar("_T")
_D = TypeVar("_D")

logger = logging.getLogger(__name__)

_FUNCTIONS = ("clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_")

_SAMPLE = 8
"""Gradients that are looked at to see whether something changed them."""

_TOO_LATE = (
    "before_clip() came after the loop had clipped; the gradients were read before that. Call it "
    "before clipping, or not at all: torch's clipping functions are seen"
)
_LATE_BATCH = (
    "observe() came after the gradients of its step had been read, by before_clip() or because the "
    "loop clipped; do either after the step's last micro-batch"
)
_READ_TWICE = (
    "the loop clipped, changed the gradients and clipped again within one optimizer step; the "
    "step has no gradient metrics. Clip once, after the last micro-batch; give watch() the "
    "GradScaler if there is one"
)


class Clipping:
    """Follows one step after another of a plain loop.

    Args:
        engine: what is trained.
        read: reads the step's gradients, once a step.
        guard: keeps a failure here away from the loop.
        report: records an event: its kind, and what happened.
    """

    def __init__(
        self,
        engine: Engine,
        read: Callable[[], None],
        guard: Guard,
        report: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._engine, self._read, self._guard, self._report = engine, read, guard, report
        self._is_installed = False
        self._is_inside = False
        self._params: list[Tensor] = []
        self._ids: set[int] = set()
        self._told: set[str] = set()
        self._start_step()

    def _start_step(self) -> None:
        self._norms: list[float | None] = []
        self._marks: dict[int, tuple[int, int]] = {}
        self._is_untouched = self._is_stale = False

    def install(self) -> Undo:
        """Sees torch's clipping functions from now on, however they were imported.

        Returns:
            A function that ends it.
        """
        if self._engine.clips_in_step:
            return do_nothing
        undos: list[Undo] = []
        try:
            undos.extend(
                patch_decorated(getattr(clip_grad, name), self._wrap(name)) for name in _FUNCTIONS
            )
        except (AttributeError, TypeError) as error:
            undo_all(undos)
            self._guard.report_failure("watching torch's clipping functions", error)
            return do_nothing
        self._is_installed = True
        return lambda: undo_all(undos)

    def before_clip(self) -> None:
        """Reads the step's gradients, unless the engine clips within its own step."""
        if self._engine.clips_in_step:
            return
        if self._norms:
            self._tell(_TOO_LATE)
            return
        self._read()
        self._guarded(self._mark_all, None)

    def note_late_batch(self) -> None:
        """Says once that a micro-batch came after the gradients of its step had been read."""
        self._tell(_LATE_BATCH)

    def enter_step(self) -> None:
        """Reads the gradients where the optimizer takes them, if nothing has read them yet."""

        def look() -> None:
            self._is_untouched = not self._has_changed(self._params)

        self._guarded(look, None)
        self._read()

    def end_step(self) -> tuple[float | None, bool]:
        """Returns the norm to which the step was clipped, and whether its reading is stale.

        The norm is infinite if nothing clipped, and None if no one factor is known.
        """
        norm = None
        if self._is_installed:
            norm = self._norms[0] if len(self._norms) == 1 else None
            norm = math.inf if not self._norms and self._is_untouched else norm
        found = norm, self._is_stale
        self._start_step()
        return found

    def _guarded(self, function: Callable[[], _T], default: _D) -> _T | _D:
        return self._guard.call("watching the clipping", function, default)

    # -- torch's functions -----------------------------------------------------------------------

    def _wrap(self, name: str) -> Callable[..., Any]:
        def clip(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._is_inside or torch.compiler.is_compiling():
                return original(*args, **kwargs)
            args, kwargs, given = _hold_parameters(args, kwargs)
            norm, kind = _norm_of_call(name, args, kwargs)
            clips = isinstance(norm, Tensor) or norm != math.inf  # else it only measures
            is_ours = clips and self._guarded(lambda: self._is_ours(given), False)
            if is_ours:
                self._before(given, norm, kind)
            self._is_inside = True  # one function calls another
            try:
                return original(*args, **kwargs)
            finally:
                self._is_inside = False
                if is_ours:
                    self._guarded(lambda: self._mark(given), None)

        return clip

    def _is_ours(self, given: list[Tensor]) -> bool:
        """Whether a call clips gradients of what is trained here."""
        if any(id(p) not in self._ids for p in given):
            self._look_at_model()
        return any(p.grad is not None and id(p) in self._ids for p in given)

    def _look_at_model(self) -> None:
        self._params = list(self._engine.model.parameters())
        self._ids = {id(p) for p in self._params}

    def _before(self, given: list[Tensor], norm: Any, kind: Any) -> None:
        if self._norms:
            self._norms.append(None)
            self._guarded(lambda: self._check_again(given), None)
            return
        self._read()
        self._norms.append(self._guarded(lambda: self._one_factor(given, norm, kind), None))

    def _check_again(self, given: list[Tensor]) -> None:
        """Checks that a further call clips the gradients that the first one left."""
        if self._has_changed(given):
            self._is_stale = True
            self._tell(_READ_TWICE)

    def _one_factor(self, given: list[Tensor], norm: Any, kind: Any) -> float | None:
        """Returns the norm if the call scales all gradients by one factor from it, else None."""
        is_euclidean = isinstance(norm, int | float) and kind == 2
        scale = self._engine.grad_scale()
        held = {id(p) for p in given}
        is_whole = all(id(p) in held for p in self._params if p.grad is not None)
        is_unscaled = isinstance(scale, float) and scale == 1.0
        return float(norm) if is_euclidean and is_whole and is_unscaled else None

    # -- whether gradients changed ---------------------------------------------------------------

    def _mark_all(self) -> None:
        if not self._params:
            self._look_at_model()
        self._mark(self._params)

    def _mark(self, params: list[Tensor]) -> None:
        """Remembers what changes if something writes to gradients; never copies to the host."""
        self._marks |= _versions(params)

    def _has_changed(self, params: list[Tensor]) -> bool:
        """Whether something wrote to marked gradients."""
        now = _versions(params)
        return any(now[key] != self._marks[key] for key in now.keys() & self._marks.keys())

    def _tell(self, what: str) -> None:
        """Logs and records a mistake of the loop once."""
        if what not in self._told:
            self._told.add(what)
            logger.warning("monitor: %s", what)
            self._report("monitor", {"clipping": what})


def _versions(params: list[Tensor]) -> dict[int, tuple[int, int]]:
    """Returns identity and version of some gradients; tensors count what is written to them."""
    chosen = params[:: max(1, len(params) // _SAMPLE)]
    return {id(p): (id(p.grad), p.grad._version) for p in chosen if p.grad is not None}


def _hold_parameters(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """Returns a call's arguments with parameters that can be read twice, and the parameters."""
    given = kwargs.get("parameters", args[0] if args else None)
    if isinstance(given, Tensor):
        return args, kwargs, [given]
    if not isinstance(given, Iterable):
        return args, kwargs, []
    held = list(given)
    # torch warns of an empty generator.
    again = (p for p in held) if isinstance(given, GeneratorType) else held
    if "parameters" in kwargs:
        return args, {**kwargs, "parameters": again}, held
    return (again, *args[1:]), kwargs, held


def _norm_of_call(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Returns the norm to which a call clips, and the kind of norm; None where there is none."""
    if name != "clip_grad_norm_":
        return None, None
    places = {"max_norm": (1, None), "norm_type": (2, 2.0)}
    norm, kind = (
        kwargs.get(key, args[at] if len(args) > at else default)
        for key, (at, default) in places.items()
    )
    return norm, kind
