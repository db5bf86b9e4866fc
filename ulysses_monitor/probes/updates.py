"""``optim/update_ratio/*`` and ``lora/update_ratio_A|B/*``: how far a step moved the parameters.

The norm of a step's change over the norm that the parameter entered it with. A copy of the
parameters to subtract from would double their memory. Adam's change follows from what it leaves
behind, so it is computed after the step, a piece at a time::

    u = lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^t) + eps)
    Adam:   p' = p - u                    AdamW:  p' = p * (1 - lr * weight_decay) - u

(Kingma and Ba, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter, arXiv 1711.05101, algorithm 2;
eps where torch and DeepSpeed put it.) For every other optimizer, and for parameters in half
precision, whose rounding that does not show, the parameters are copied if this rank's part of them
is small, as adapters are; if not, there is no such metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulysses_monitor.engines import Shard
from ulysses_monitor.probes import kernels
from ulysses_monitor.probes.base import Reading
from ulysses_monitor.probes.layout import Layout, median, metric_names
from ulysses_monitor.probes.standard import count_elements, scatter_rows
from ulysses_monitor.probes.sums import GPU_PIECE, split_pieces, statistics
from ulysses_monitor.records import Cost

__all__ = ["COPY_LIMIT", "UpdateProbe"]

Array = npt.NDArray[np.float64]

COPY_LIMIT = 1 << 24
"""Elements of parameters that a rank copies at most for optimizers without a formula."""


@dataclass(frozen=True)
class _Adam:
    """Settings of a step of Adam; the scheduler may have changed them when it is looked at."""

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    """What AdamW multiplies the parameter with, minus one."""
    corrects_bias: bool
    second: str


class UpdateProbe:
    """Looks at a step after it was done; see the module.

    Args:
        layout: the parameters.
        optimizer: the optimizer that does the arithmetic.
    """

    name = "updates"
    cost: Cost = "sampled"
    maxima = 0
    rechecks = False

    def __init__(self, layout: Layout, optimizer: torch.optim.Optimizer) -> None:
        self.layout = layout
        self.size = 3 * len(layout.names)
        self._optimizer = optimizer
        pairs = layout.adapter_pairs
        self._sides = {
            "A": np.array([pair.a for pair in pairs], np.intp),
            "B": np.array([pair.b for pair in pairs], np.intp),
        }
        self.names = metric_names("optim/update_ratio", layout)
        for side in self._sides if pairs else ():
            self.names += tuple(f"lora/update_ratio_{side}/module/{p.module}" for p in pairs)
            self.names += (f"lora/update_ratio_{side}/total",)
        self._adam: dict[int, _Adam] = {}
        self._copies: dict[int, Tensor] = {}
        self._measured: Tensor | None = None

    def before_step(self, shards: Sequence[Shard]) -> None:
        """Notes the settings; copies what no formula is known for, if it is little."""
        self._measured, self._copies, self._adam = None, {}, {}
        counted = [s for s in shards if s.is_counted]
        for s in counted:
            adam = _adam(self._optimizer, s.settings) if _is_exact(s) else None
            if adam is not None:
                self._adam[s.index] = adam
        rest = [s for s in counted if s.index not in self._adam]
        if sum(s.param.numel() for s in rest) <= COPY_LIMIT:
            self._copies = {s.index: s.param.clone() for s in rest}

    def after_step(self, shards: Sequence[Shard]) -> None:
        """Sums of squares of the change and of the parameter before, and elements measured."""
        computed, copied, unmoved = [], [], []
        for s in shards:
            adam = self._adam.get(s.index)
            if not s.is_counted:
                continue
            if s.index in self._copies:
                copied.append((self._copies[s.index], s))
            elif adam is not None and adam.second in s.state:
                computed.append((adam, s))
            elif adam is not None and not s.state:
                unmoved.append(s)  # it never got a gradient
        measured = [*(s for _, s in (*computed, *copied)), *unmoved]
        if measured:
            sums = [_computed(computed)] if computed else []
            sums += [_copied(*pair) for pair in copied]
            sums += [_unmoved(unmoved)] if unmoved else []
            rows = scatter_rows(torch.cat(sums, dim=1), [s.index for s in measured], self.layout)
            self._measured = torch.cat([rows, count_elements(measured, self.layout)])
        self._copies = {}

    def read(self, reading: Reading) -> Tensor:  # noqa: ARG002
        """What `after_step` found [3 * P]; zeros where the step was skipped."""
        if self._measured is None:
            return torch.zeros(self.size, dtype=torch.float64)
        return self._measured

    def values(self, totals: Array) -> Array | None:
        """See `Probe.values`; NaN where a part of the scope was not measured."""
        changes, before, numels = totals.reshape(3, -1)
        if not numels.any():
            return None
        # What a parameter of zeros is computed to have been is rounding.
        before = np.where(before < 1e-12 * changes, 0.0, before)
        missing = self.layout.aggregate((numels < self.layout.numels).astype(np.float64)) > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.sqrt(self.layout.aggregate(changes) / self.layout.aggregate(before))
            by_parameter = np.sqrt(changes / before)
        values = [np.where(missing, np.nan, ratios)]
        values += [
            np.append(by_parameter[side], median(by_parameter[side]))
            for side in self._sides.values()
            if len(side)
        ]
        return np.concatenate(values)


def _is_exact(shard: Shard) -> bool:
    return shard.param.dtype in (torch.float32, torch.float64)


def _adam(optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> _Adam | None:
    """The settings of a step of Adam or AdamW, torch's or DeepSpeed's; None for any other."""
    kinds = {c.__name__ for c in type(optimizer).__mro__}
    if not kinds & {"Adam", "FusedAdam", "DeepSpeedCPUAdam"}:
        return None
    decoupled = settings.get("decoupled_weight_decay", getattr(optimizer, "adam_w_mode", False))
    lr = float(settings["lr"])
    return _Adam(
        lr=lr,
        betas=(float(settings["betas"][0]), float(settings["betas"][1])),
        eps=float(settings["eps"]),
        decay=-lr * float(settings["weight_decay"]) if decoupled else 0.0,
        corrects_bias=bool(settings.get("bias_correction", True)),
        second="max_exp_avg_sq" if settings.get("amsgrad") else "exp_avg_sq",
    )


def _computed(adams: Sequence[tuple[_Adam, Shard]]) -> Tensor:
    """Sums of squares of the change and of the parameter before, from Adam's states [2, N]."""
    steps = [
        (_step(adam, s), (s.param, s.state["exp_avg"], s.state[adam.second])) for adam, s in adams
    ]
    if all(tensors[0].device.type == "cpu" for _, tensors in steps):
        return kernels.adam_changes(steps)
    return torch.stack([adam_change_by_torch(*step) for step in steps], dim=1)


def _step(adam: _Adam, shard: Shard) -> kernels.AdamStep:
    steps = 1.0 if shard.steps is None else shard.steps
    if isinstance(steps, Tensor):  # to read a GPU's would wait for it
        on_host = steps.device.type == "cpu"
        steps = float(steps.numpy()) if on_host else steps.double()
    first, second = ((1 - beta**steps) if adam.corrects_bias else 1.0 for beta in adam.betas)
    return kernels.AdamStep(adam.lr / first, second**-0.5, adam.eps, adam.decay)


def adam_change_by_torch(step: kernels.AdamStep, tensors: Sequence[Tensor]) -> Tensor:
    """One column of `kernels.adam_changes` [2], for a GPU; torch's norms there add as trees."""
    total = torch.zeros(2, dtype=torch.float64, device=tensors[0].device)
    for after, m, v in zip(*(split_pieces(t, GPU_PIECE) for t in tensors), strict=True):
        update = m / (v.sqrt() * step.root_scale + step.eps) * step.rate
        before = (after + update) / (1 + step.decay)
        change = update - step.decay * before
        norms = [torch.linalg.vector_norm(x) for x in (change, before)]
        total += torch.stack(norms).double().square()
    return total


def _unmoved(shards: Sequence[Shard]) -> Tensor:
    """The same two sums of parameters that the step did not change [2, N]."""
    squares = statistics([s.param for s in shards])[0]
    return torch.stack([torch.zeros_like(squares), squares])


def _copied(before: Tensor, shard: Shard) -> Tensor:
    """The same two sums from the parameter before and after [2, 1]."""
    after = shard.param
    total = torch.zeros(2, 1, dtype=torch.float64, device=after.device)
    for old, new in zip(split_pieces(before), split_pieces(after), strict=True):
        old = old.double()
        total += torch.stack([(new.double() - old).square().sum(), old.square().sum()])[:, None]
    return total
