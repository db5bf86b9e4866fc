"""What is refused before the first step: policies that contradict one another, or cannot act."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Collection, Sequence

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.ranks import rank
from ulysses_monitor.policies import Managed
from ulysses_monitor.policies.base import MAX_STEPS

__all__ = ["check_conflicts", "fitting"]

logger = logging.getLogger(__name__)


def check_conflicts(policies: Sequence[Managed], scheduler: str = "") -> None:
    """Refuses policies that work against one another, or against the Trainer.

    Args:
        policies: those of the run that are not off.
        scheduler: the Trainer's, where it changes the learning rate.

    Raises:
        InputError: two of them set the learning rate, or one and the Trainer plan it.
    """
    owners = [policy.name for policy in policies if "lr_factor" in policy.action_kinds]
    if len(owners) > 1:
        raise InputError(
            f"policies {owners[0]} and {owners[1]}: both set the learning rate; leave one out, or "
            f"set mode: off for it"
        )
    for policy in policies:
        plans = {"lr_factor", "clip_norm"} <= policy.action_kinds
        if plans and scheduler not in ("", "constant"):
            raise InputError(
                f"policy {policy.name}: plans the learning rate, and so does the Trainer's "
                f"{scheduler} schedule; set lr_scheduler_type: constant"
            )


def fitting(
    policies: Sequence[Managed],
    metrics: Collection[str],
    max_steps: int | None,
    can: Collection[str],
) -> list[Managed]:
    """The policies that can act in this run; a preset's that cannot are left out.

    Args:
        policies: of the run.
        metrics: names of all that is collected.
        max_steps: of the training, where it is known.
        can: kinds of action that not every training can do, and this one can.

    Raises:
        InputError: one that the user named cannot act; says why, and what to change.
    """
    found = []
    for policy in policies:
        reason = _why_not(policy, metrics, max_steps, can)
        if reason and not policy.preset:
            raise InputError(f"policy {policy.name}: {reason}")
        if reason and rank() == 0:
            logger.info("monitor: %s without %s: %s", policy.preset, policy.name, reason)
        if not reason:
            found.append(policy)
    return found


def _why_not(
    policy: Managed, metrics: Collection[str], max_steps: int | None, can: Collection[str]
) -> str:
    for pattern in policy.needed_metrics:
        if pattern == MAX_STEPS and max_steps is None:
            return "goes by the number of steps, which is not known; give watch(..., max_steps=)"
        if pattern != MAX_STEPS and not fnmatch.filter(metrics, pattern):
            return f"its metric {pattern} is not collected{_hint(pattern, metrics)}"
    if missing := (policy.action_kinds & {"save", "stop"}) - {*can}:
        return f"the training cannot {min(missing)}; give watch(..., save=)"
    silent = getattr(policy.policy, "steps_before_acting", 0)
    if max_steps is not None and silent >= max_steps:
        return (
            f"can never act: it looks on for {silent} steps, and the training has {max_steps}; "
            "lower its warmup, reference or patience"
        )
    return ""


def _hint(pattern: str, metrics: Collection[str]) -> str:
    if pattern.startswith("lora/"):
        return ": the model has no adapters; train with LoRA, or leave the policy out"
    if pattern == "train/loss/total":
        return ": give the loss with observe(loss=...) at each step"
    return nearest(pattern, metrics)
