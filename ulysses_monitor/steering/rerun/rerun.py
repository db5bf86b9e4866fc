"""Decides, on every rank alike, that a step is computed again, does it, and compares.

The rules that ask for it see each step's record before the optimizer steps, on every rank, with the
same numbers; so all ranks begin at the same step. Each makes its calls of the model again, with the
weights that made the step, and differentiates them with `torch.autograd.grad`. That adds nothing to
``param.grad`` and calls none of the hooks with which DDP and DeepSpeed reduce. Then the ranks tell
each other whether all succeeded, and only if they did, average their gradients.

Legend: P trainable parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_monitor.common.again import computing_again
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.ranks import any_rank, world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.records.command import RERUN
from ulysses_monitor.rules import Rule, RuleSet
from ulysses_monitor.steering.rerun.buffers import Buffers
from ulysses_monitor.steering.rerun.calls import Calls
from ulysses_monitor.steering.rerun.random_numbers import RandomState
from ulysses_monitor.steering.rerun.refusals import check_rerun
from ulysses_monitor.steering.rerun.results import same_bits

__all__ = ["Rerun", "make_rerun"]

_LOSS_DIFFERS, _NORM_DIFFERS = 0.01, 0.05
"""Relative differences from which a number counts as another: kernels that add in another order,
and gradients that are reduced in bf16, differ by less."""

_VERDICTS = {
    True: "the spike repeats: it comes from the data or the model",
    False: "the spike does not repeat: it comes from the hardware or from nondeterminism",
}


@dataclass(frozen=True)
class _Again:
    """What this rank computed again.

    Attributes:
        gradients: [P], of this rank's calls, None where the loss does not depend on a parameter.
        losses: of the first time and of this time, and how many, summed over this rank's calls.
        differing: results that are not equal bit by bit.
    """

    gradients: list[Tensor | None]
    losses: tuple[Tensor, Tensor, int]
    differing: int


def make_rerun(engine: Engine, rules: Sequence[Rule], obstacle: str, guard: Guard) -> Rerun | None:
    """Makes what computes steps again if one of `rules` asks for it.

    Raises:
        InputError: this training cannot do it; see `check_rerun`.
    """
    asking = [rule for rule in rules if RERUN in getattr(rule, "on_alert", ())]
    if not asking:
        return None
    check_rerun(engine, asking, obstacle)
    return Rerun(engine, asking, guard)


class Rerun:
    """Computes a step again where a rule asks for it. It changes nothing of the training.

    Args:
        engine: what is trained.
        rules: those that ask for it.
        guard: calls what keeps a step.
    """

    def __init__(self, engine: Engine, rules: Sequence[Rule], guard: Guard) -> None:
        self._engine, self._guard = engine, guard
        self._rules = RuleSet(rules, guard)
        self._calls = Calls(engine.model, engine.device, guard)
        self._verdicts: dict[int, str] = {}

    def close(self) -> None:
        """Removes the hooks."""
        self._calls.close()

    def look(self, make_record: Callable[[], StepRecord]) -> dict[str, Any] | None:
        """Computes a step again if a rule asks for it; every rank calls it before the step.

        Args:
            make_record: makes the record of what is known of the step, the same on all ranks.

        Returns:
            What happened, for an event; None if no rule asked.
        """
        try:
            record = make_record()
            alerts = self._rules.observe(record)
            return self._run(record, alerts) if alerts else None
        finally:
            self._calls.forget()

    def explain(self, alert: Alert) -> str:
        """Returns what computing the alert's step again showed; empty if it was not done."""
        return self._verdicts.get(alert.step, "")

    def _run(self, record: StepRecord, alerts: Sequence[Alert]) -> dict[str, Any]:
        began, size = time.perf_counter(), self._calls.size
        again, error = self._attempt()
        about: dict[str, Any] = {"of_step": record.step, "rules": [a.rule for a in alerts]}
        if any_rank(again is None, self._engine.device) or again is None:
            reason = error or "it failed on another rank"
            self._verdicts = {record.step: f"The step could not be computed again: {reason}."}
            return {**about, "error": reason}
        about |= self._compare(record, again)
        about |= {"calls": len(self._calls.kept), "kept_bytes": size}
        self._verdicts = {record.step: f"Computed again, {about['verdict']}."}
        return {**about, "seconds": time.perf_counter() - began}

    # -- computing -----------------------------------------------------------------------------

    def _attempt(self) -> tuple[_Again | None, str]:
        """Computes this rank's part; whatever happens, the training's state is as before."""
        calls, device = self._calls, self._engine.device
        if calls.problem or not calls.kept:
            return None, calls.problem or "no call of the model was seen"
        random, buffers = RandomState.take(device), Buffers.of(self._engine.model)
        try:
            if calls.buffers is not None:
                calls.buffers.restore()
            with computing_again():
                return self._compute(), ""
        except Exception as error:  # noqa: BLE001 - the event says it
            return None, " ".join(f"{type(error).__name__}: {error}".split())[:500]
        finally:
            buffers.restore()
            random.restore(device)

    def _compute(self) -> _Again:
        model, device = self._engine.model, self._engine.device
        params = [p for p in model.parameters() if p.requires_grad]
        total: list[Tensor | None] = [None] * len(params)
        first = again = torch.zeros((), dtype=torch.float64, device=device)
        differing = count = 0
        for call in self._calls.kept:
            found = call.again(model, device)
            pairs = list(zip(call.results, found, strict=True))
            for result, value in pairs:
                differing += not same_bits(result.value, value.detach())
                if result.value.numel() == 1 and result.gradient is not None:
                    count += 1
                    factor = result.gradient.double().reshape(())
                    first = first + result.value.double().reshape(()) * factor
                    again = again + value.detach().double().reshape(()) * factor
            used = [(value, r.gradient) for r, value in pairs if r.gradient is not None]
            if not used:
                continue
            outputs, gradients = zip(*used, strict=True)
            new = torch.autograd.grad(outputs, params, gradients, allow_unused=True)
            total = [_add(old, more) for old, more in zip(total, new, strict=True)]
        return _Again(total, (first, again, count), differing)

    # -- comparing -----------------------------------------------------------------------------

    def _compare(self, record: StepRecord, again: _Again) -> dict[str, Any]:
        """Averages over ranks what they computed again, and compares it; every rank calls it."""
        scale = float(self._engine.loss_scale())
        norm = self._reduced_norm(again.gradients) / scale
        first, second, count = again.losses
        counts = torch.tensor([count, again.differing]).to(first)
        totals = torch.cat([torch.stack([first, second]), counts])
        if world_size() > 1:
            dist.all_reduce(totals)
        *sums, count, differing = totals.tolist()
        # A model that returns no loss leaves it to the training, which is not repeated.
        loss, loss_again = (v / scale / world_size() if count else None for v in sums)
        before = _norm_of(record)
        is_same = _are_near(loss, loss_again, _LOSS_DIFFERS) and _are_near(
            before, norm, _NORM_DIFFERS
        )
        return {
            "repeats": is_same,
            "verdict": _VERDICTS[is_same],
            "loss": loss,
            "loss_again": loss_again,
            "grad_norm": before,
            "grad_norm_again": norm,
            "outputs_differ": int(differing),
        }

    def _reduced_norm(self, gradients: Sequence[Tensor | None]) -> float:
        """Returns the norm of the gradients' mean over ranks, still times the loss scale.

        One parameter at a time, so that little more than the gradients is in memory.
        """
        params = [p for p in self._engine.model.parameters() if p.requires_grad]
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for param, gradient in zip(params, gradients, strict=True):
            own = torch.zeros_like(param) if gradient is None else gradient
            own = own.detach().to(torch.promote_types(own.dtype, torch.float32))
            if world_size() > 1:
                dist.all_reduce(own)
                own = own / world_size()
            total = total + own.double().square().sum()
        return float(total.sqrt())


def _norm_of(record: StepRecord) -> float | None:
    """Returns the norm of a step's gradients, NaN if some are not finite; None if it is unknown."""
    if "grad/norm/total" not in record:
        return None
    has_nonfinite = record.get("grad/nonfinite/total", 0.0) > 0
    return math.nan if has_nonfinite else record["grad/norm/total"]  # which leaves them out


def _add(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new


def _are_near(one: float | None, other: float | None, most: float) -> bool:
    """Whether two numbers are alike; so are two that are not finite, and what is not known."""
    if one is None or other is None:
        return True
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return abs(one - other) <= most * max(abs(one), abs(other))
