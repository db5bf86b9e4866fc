"""Parameters that get no gradient or do not move, and updates of the wrong size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps, name_some
from ulysses_monitor.rules.history import History, median_of

__all__ = [
    "NoGradient",
    "NothingMoves",
    "SmallUpdate",
    "Still",
    "WeightJump",
]

NORM = "grad/norm/total"
NORMS = "grad/norm/param/*"
RATIO = "optim/update_ratio/total"
RATIOS = "optim/update_ratio/param/*"
RATE = "optim/lr/0"
WEIGHTS = "param/norm/total"
LAYERS = "param/norm/layer/*"
LAYER_RATIOS = "optim/update_ratio/layer/*"

Array = npt.NDArray[np.float64]
_Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class NoGradient(BuiltinRule):
    """Finds parameters whose gradient is exactly zero for many steps while others have one."""

    steps: Steps = 20
    """Number of steps."""
    tables = (NORMS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        names, rows = history.table(NORMS)
        zero = _zero_in_all(rows, self.steps)
        if zero is None or zero.all():
            return []
        where = _name(names, zero, NORMS)
        text = (
            f"{int(zero.sum())} of {len(names)} trainable tensors have had a gradient of exactly "
            f"zero for {self.steps} steps: {where}"
        )
        return [self.alert(history, NORMS, 0.0, 0.0, text, where=where)]


@dataclass(frozen=True, kw_only=True)
class Still(BuiltinRule):
    """Finds parameters that have a gradient and are bit for bit the same after steps."""

    steps: Annotated[int, Field(ge=1, le=64)] = 3
    """Number of measured steps."""
    least: Annotated[float, Field(ge=0)] = 1e-3
    """A gradient counts above this share of the median over parameters."""
    tables = (RATIOS, NORMS)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (RATIOS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.steps

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        names, rows = history.table(RATIOS)
        zero = _zero_in_all(rows, self.steps)
        if zero is None or zero.all():
            return []
        record = history[-1]
        norms = np.array([record.get(_norm_of(name), 0.0) for name in names])
        # Keys' biases have a gradient of rounding alone: attention does not depend on them.
        zero &= norms > self.least * median_of(norms)
        # The ratio of a tensor that is still zero, as LoRA's B is at first, is NaN.
        known = np.isfinite(rows[-1])
        zero &= known | np.array([record.get(_weights_of(name)) == 0 for name in names])
        if not zero.any():
            return []
        where = _name(names, zero, RATIOS)
        text = (
            f"{int(zero.sum())} of {len(names)} tensors have a gradient and did not change in "
            f"{self.steps} measured steps: {where}"
        )
        return [self.alert(history, RATIOS, 0.0, 0.0, text, where=where)]


@dataclass(frozen=True, kw_only=True)
class NothingMoves(BuiltinRule):
    """Finds a step with a gradient and a learning rate that changed no weight."""

    reads = (RATIO, RATE, NORM)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (RATIO,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        moved, rate, norm = (history.last(name) for name in self.reads)
        if moved != 0 or not (rate > 0 and norm > 0):
            return []
        text = (
            f"no weight changed, though the gradient norm is {norm:.3g} and the learning rate "
            f"{rate:.3g}"
        )
        return [self.alert(history, RATIO, moved, 0.0, text)]


@dataclass(frozen=True, kw_only=True)
class SmallUpdate(BuiltinRule):
    """Finds updates that are too small to matter while the rate is not near its end."""

    below: _Factor = 3e-6
    """Update ratio that is too small."""
    reads = (RATIO, RATE)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (RATIO,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        ratio, rate = history.last(RATIO), history.last(RATE)
        if not 0 < ratio < self.below:
            return []
        if not rate > 0.3 * history.highest(RATE):
            return []
        text = f"a step changes the weights by {ratio:.2g} of their norm at a rate of {rate:.2g}"
        return [self.alert(history, RATIO, ratio, self.below, text)]


@dataclass(frozen=True, kw_only=True)
class WeightJump(BuiltinRule):
    """Finds a layer whose weights changed far more than the optimizer's steps can explain."""

    times: _Factor = 4.0
    """Multiple of what the steps in between can have done."""
    least: _Factor = 0.05
    """Smallest relative change of the norm that counts."""
    reads = (WEIGHTS,)
    tables = (LAYERS, LAYER_RATIOS)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (LAYERS,)

    @property
    def values_needed(self) -> int:
        """See `BuiltinRule`."""
        return 2

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        names, rows = history.table(LAYERS)
        _, ratios = history.table(LAYER_RATIOS)
        if len(rows) < 2 or not ratios or len(ratios[-1]) != len(rows[-1]) or not rows[-2].all():
            return []
        changed = np.abs(rows[-1] - rows[-2]) / rows[-2]
        steps = np.flatnonzero(np.isfinite(history.column(WEIGHTS)))[-2:]
        allowed = (
            self.times * float(np.ptp(steps)) * np.fmax(ratios[-1], ratios[-min(2, len(ratios))])
        )
        odd = np.flatnonzero(changed > np.fmax(allowed, self.least))
        if not len(odd):
            return []
        worst = int(odd[changed[odd].argmax()])
        where = name_some(names[i].removeprefix("param/norm/") for i in odd.tolist())
        text = (
            f"the norm of {where} went from {rows[-2][worst]:.4g} to {rows[-1][worst]:.4g} "
            f"in {np.ptp(steps)} steps, which the optimizer's steps do not explain"
        )
        change, limit = changed[worst], max(allowed[worst], self.least)
        return [self.alert(history, names[worst], change, limit, text, where=where)]


def _zero_in_all(rows: Sequence[Array], steps: int) -> npt.NDArray[np.bool_] | None:
    """Returns which columns are zero, or NaN, in each of the last rows; None if there is none."""
    above = rows[-1] > 0
    if len(rows) < steps or above.all():
        return None
    zero: npt.NDArray[np.bool_] = ~above
    for i in range(2, steps + 1):
        zero &= ~(rows[-i] > 0)
        if not zero.any():
            return None
    return zero


def _name(names: Sequence[str], chosen: npt.NDArray[np.bool_], pattern: str) -> str:
    prefix = pattern.removesuffix("*")
    return name_some(names[i].removeprefix(prefix) for i in np.flatnonzero(chosen).tolist())


def _weights_of(ratio: str) -> str:
    return ratio.replace("optim/update_ratio/", "param/norm/", 1)


def _norm_of(ratio: str) -> str:
    return ratio.replace("optim/update_ratio/", "grad/norm/", 1)
