"""``optim/update_ratio/*`` and ``lora/update_ratio_A|B/*``: how far a step moved the parameters.

The ratio is the norm of the step's change over the norm of the parameter before the step. Copying
the parameters to subtract them later would double their memory. Adam's change follows from the
state that it leaves behind, so it is computed after the step, a piece at a time::

    u = lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^t) + eps)
    Adam:   p' = p - u                    AdamW:  p' = p * (1 - lr * weight_decay) - u

(Kingma and Ba, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter, arXiv 1711.05101, algorithm 2;
eps where torch and DeepSpeed put it.) It applies only if the engine knows the optimizer's `step`: a
subclass with a `step` of its own may compute anything. And it misses the
rounding of half-precision parameters. These parameters are copied if this rank's part is small, as
adapters are; otherwise they have no such metric.

Legend: P trainable parameters, N parameters that are measured in one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ulysses_monitor.engines import Engine, Shard
from ulysses_monitor.probes.adam_step import AdamStep
from ulysses_monitor.probes.base import Reading
from ulysses_monitor.probes.compiled import KERNELS
from ulysses_monitor.probes.layout import Layout, median, metric_names
from ulysses_monitor.probes.standard import count_elements, scatter_rows
from ulysses_monitor.probes.sums import GPU_PIECE, PIECE, split_pieces, statistics
from ulysses_monitor.records import Cost

__all__ = ["COPY_LIMIT", "UpdateProbe"]

Array = npt.NDArray[np.float64]

COPY_LIMIT = 1 << 24
"""Most elements of parameters that a rank copies when the formula does not apply."""


@dataclass(frozen=True)
class _Adam:
    """Settings of an Adam step, kept because a scheduler may change them before it is measured."""

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    """The factor that AdamW applies to the parameter, minus one; 0 for Adam."""
    corrects_bias: bool
    second: str
    """Name of the second moment in the optimizer's state."""
    steps_before: Tensor | float | None
    """The step count before the step, if only that tells whether a `GradScaler` skipped it."""


class UpdateProbe:
    """Measures a step after the optimizer took it; see the top of this file.

    Args:
        layout: the parameters.
        engine: the engine, which says what its optimizer computes.
    """

    name = "updates"
    cost: Cost = "sampled"
    maxima = 0
    rechecks = False

    def __init__(self, layout: Layout, engine: Engine) -> None:
        self.layout = layout
        self.size = 3 * len(layout.names)
        self._engine = engine
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
        """Keeps Adam's settings, and copies the other parameters if they are small."""
        self._measured, self._copies, self._adam = None, {}, {}
        counted = [s for s in shards if s.is_counted]
        for s in counted:
            adam = self._adam_settings(s)
            if adam is not None:
                self._adam[s.index] = adam
        rest = [s for s in counted if s.index not in self._adam]
        if sum(s.param.numel() for s in rest) <= COPY_LIMIT:
            self._copies = {s.index: s.param.clone() for s in rest}

    def _adam_settings(self, shard: Shard) -> _Adam | None:
        """Returns the settings of the coming step if the formula describes it, else None."""
        settings = shard.settings
        is_exact = shard.param.dtype in (torch.float32, torch.float64)
        kind = self._engine.adam_update(settings) if settings and is_exact else None
        if kind is None:
            return None
        lr = float(settings["lr"])
        return _Adam(
            lr=lr,
            betas=(float(settings["betas"][0]), float(settings["betas"][1])),
            eps=float(settings["eps"]),
            decay=-lr * float(settings["weight_decay"]) if kind == "adamw" else 0.0,
            corrects_bias=bool(settings.get("bias_correction", True)),
            second="max_exp_avg_sq" if settings.get("amsgrad") else "exp_avg_sq",
            # A fused step is called after an overflow too, and then changes nothing on the device.
            steps_before=_copy_steps(shard) if settings.get("fused") else None,
        )

    def after_step(self, shards: Sequence[Shard]) -> None:
        """Computes squared norms of change and parameter, and elements measured [3 * P]."""
        computed, copied, unmoved = [], [], []
        for s in shards:
            adam = self._adam.get(s.index)
            if not s.is_counted:
                continue
            if s.index in self._copies:
                copied.append((self._copies[s.index], s))
            elif adam is not None and adam.second in s.state:
                computed.append((adam, s))
            elif adam is not None and not (s.state or s.has_state):
                unmoved.append(s)  # it never got a gradient
        measured = [*(s for _, s in (*computed, *copied)), *unmoved]
        if measured:
            sums = [_measure_adam(computed)] if computed else []
            sums += [_measure_copy(*pair) for pair in copied]
            sums += [_measure_unmoved(unmoved)] if unmoved else []
            rows = scatter_rows(torch.cat(sums, dim=1), [s.index for s in measured], self.layout)
            self._measured = torch.cat([rows, count_elements(measured, self.layout)])
        self._copies = {}

    def read(self, reading: Reading) -> Tensor:  # noqa: ARG002
        """Returns what `after_step` found [3 * P]; zeros if the step was skipped."""
        if self._measured is None:
            return torch.zeros(self.size, dtype=torch.float64)
        return self._measured

    def values(self, totals: Array) -> Array | None:
        """See `Probe.values`; NaN if a part of the scope was not measured."""
        changes, before, numels = totals.reshape(3, -1)  # [3 * P] -> [3, P]
        if not numels.any():
            return None
        # A parameter that was zero comes out of the formula as rounding errors.
        before = np.where(before < 1e-12 * changes, 0.0, before)
        missing = self.layout.aggregate((numels < self.layout.numels).astype(np.float64)) > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.sqrt(self.layout.aggregate(changes) / self.layout.aggregate(before))
        values = [np.where(missing, np.nan, ratios)]
        by_parameter = values[0][len(ratios) - len(changes) :]  # [1 + L + P] -> [P]
        values += [
            np.append(by_parameter[side], median(by_parameter[side]))
            for side in self._sides.values()
            if len(side)
        ]
        return np.concatenate(values)


def _measure_adam(adams: Sequence[tuple[_Adam, Shard]]) -> Tensor:
    """Returns squared norms of change and parameter before the step, from Adam's state [2, N]."""
    steps = [
        (_adam_step(adam, s), (s.param, s.state["exp_avg"], s.state[adam.second]))
        for adam, s in adams
    ]
    on_cpu = all(tensors[0].device.type == "cpu" for _, tensors in steps)
    if on_cpu and KERNELS is not None:
        found: Tensor = KERNELS.adam_changes(steps)
        return found
    return torch.stack([adam_change_by_torch(*step) for step in steps], dim=1)


def _adam_step(adam: _Adam, shard: Shard) -> AdamStep:
    steps = 1.0 if shard.steps is None else shard.steps
    if isinstance(steps, Tensor):  # reading it from a GPU would make the host wait
        on_host = steps.device.type == "cpu"
        steps = float(steps.numpy()) if on_host else steps.double()
    done: float | Tensor = 1.0
    if adam.steps_before is not None:
        before = adam.steps_before
        done = steps - (float(before) if isinstance(steps, float) else before)  # 0 or 1
        steps = steps + (1 - done)  # not 0, by which the corrections would divide
    first, second = ((1 - beta**steps) if adam.corrects_bias else 1.0 for beta in adam.betas)
    return AdamStep(done * adam.lr / first, second**-0.5, adam.eps, done * adam.decay)


def _copy_steps(shard: Shard) -> Tensor | float:
    return shard.steps.clone() if isinstance(shard.steps, Tensor) else shard.steps or 0.0


def adam_change_by_torch(step: AdamStep, tensors: Sequence[Tensor]) -> Tensor:
    """Returns one column of `kernels.adam_changes` [2], for a GPU and for a CPU without Numba.

    On a GPU norms add as trees. On a CPU they add one by one, so they need float64.
    """
    on_cpu = tensors[0].device.type == "cpu"
    size, accumulator = (PIECE, torch.float64) if on_cpu else (GPU_PIECE, None)
    total = torch.zeros(2, dtype=torch.float64, device=tensors[0].device)
    for after, m, v in zip(*(split_pieces(t, size) for t in tensors), strict=True):
        m, v = m.to(after.dtype), v.to(after.dtype)
        update = m / (v.sqrt() * step.root_scale + step.eps) * step.rate
        before = (after + update) / (1 + step.decay)
        change = update - step.decay * before
        norms = [torch.linalg.vector_norm(x, dtype=accumulator) for x in (change, before)]
        total += torch.stack(norms).double().square()
    return total


def _measure_unmoved(shards: Sequence[Shard]) -> Tensor:
    """Returns the same squared norms for parameters that the step did not change [2, N]."""
    squares = statistics([s.param for s in shards])[0]
    return torch.stack([torch.zeros_like(squares), squares])


def _measure_copy(before: Tensor, shard: Shard) -> Tensor:
    """Returns the same squared norms from a copy made before the step [2, 1]."""
    after = shard.param
    total = torch.zeros(2, 1, dtype=torch.float64, device=after.device)
    for old, new in zip(split_pieces(before), split_pieces(after), strict=True):
        old = old.double()
        total += torch.stack([(new.double() - old).square().sum(), old.square().sum()])[:, None]
    return total
