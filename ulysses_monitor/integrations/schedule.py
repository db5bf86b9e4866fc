"""What a Trainer's arguments and state let one expect: the rate, and the loss after a resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ulysses_monitor.common.patching import Undo
from ulysses_monitor.common.ranks import rank
from ulysses_monitor.session.session import Session
from ulysses_monitor.steering.acting import scheduled_rates

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState

__all__ = ["find_schedule", "loss_before", "watch_schedule"]

OFF = "optim/lr_off_schedule/0"
BEFORE = "train/loss_before_resume/total"

_LOSSES = 8
"""Logged losses before a resume of which the largest counts."""


def watch_schedule(trainer: Trainer, session: Session) -> list[Undo]:
    """Records at every step how far the rate is from the schedule that the arguments name."""

    def add() -> list[Undo]:
        factor = find_schedule(trainer)
        return [] if factor is None else [session.sources.add((OFF,), _reader(trainer, factor))]

    return session.guarded("reading the learning rate's schedule", add, [])


def find_schedule(trainer: Trainer) -> Callable[[int], float] | None:
    """Returns the share of the peak rate by the number of steps done; None if it is not known.

    It is not where the schedule is the user's own or DeepSpeed's, or depends on the evaluation.
    """
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    args, steps = trainer.args, trainer.state.max_steps
    if not getattr(trainer, "_created_lr_scheduler", False) or steps <= 0:
        return None
    if not isinstance(trainer.lr_scheduler, LambdaLR):
        return None
    # The Trainer's own may have been made for another number of steps, so make it anew.
    defaults: dict[str, Any] = getattr(trainer.optimizer, "defaults", {})  # DeepSpeed's has none
    rate = float(defaults.get("lr", args.learning_rate))  # of which lowest rates are a share
    unused = torch.optim.SGD([torch.zeros(1, device="cpu")], lr=rate)
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer=unused,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return made.lr_lambdas[0] if isinstance(made, LambdaLR) else None


def _reader(trainer: Trainer, factor: Callable[[int], float]) -> Callable[[], tuple[float]]:
    """Returns what reads the distance on rank 0: sources are summed over ranks."""
    skipped = _Skipped(trainer)

    def read() -> tuple[float]:
        optimizer: Any = trainer.optimizer
        peak = float(optimizer.param_groups[0].get("initial_lr", 0.0))
        planned = peak * factor(trainer.state.global_step - skipped.count())
        # Another monitor's policy may have changed the rate of this step already.
        away = (scheduled_rates(optimizer)[0] - planned) / peak if peak else 0.0
        return (away if rank() == 0 else 0.0,)

    return read


class _Skipped:
    """Counts the steps that were skipped for an overflow: the Trainer's scheduler waits then."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._count = 0

    def count(self) -> int:
        """Returns the number of steps skipped so far; call it once a step."""
        self._count += bool(getattr(self._trainer.accelerator, "optimizer_step_was_skipped", False))
        return self._count


def loss_before(state: TrainerState) -> dict[str, float]:
    """Returns the largest of the last losses that were logged before a resume; empty if unknown."""
    logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
    if not state.global_step or not logged:
        return {}
    return {BEFORE: float(max(logged[-_LOSSES:]))}
