"""Which policies can act in a run; the same answer while training and in a replay."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.policies.base import MAX_STEPS
from ulysses_monitor.policies.managed import Managed

__all__ = ["Fit", "check_conflicts", "fit_policies"]


@dataclass(frozen=True)
class Fit:
    """The policies that can act in a run.

    Attributes:
        policies: those that can.
        left_out: why another policy cannot act, by its name.
    """

    policies: list[Managed] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def check_conflicts(policies: Sequence[Managed], scheduler: str = "") -> None:
    """Refuses policies that work against one another, or against the Trainer.

    Args:
        policies: the policies of the run that are not off.
        scheduler: the Trainer's schedule of the learning rate; empty if there is none.

    Raises:
        InputError: two policies set the learning rate, or a policy and the Trainer plan it.
    """
    owners = [policy.name for policy in policies if "lr_factor" in policy.action_kinds]
    if len(owners) > 1:
        raise InputError(
            f"policies {owners[0]} and {owners[1]} both set the learning rate; remove one, or set "
            "mode: off for it"
        )
    for policy in policies:
        plans_rate = {"lr_factor", "clip_norm"} <= policy.action_kinds
        if plans_rate and scheduler not in ("", "constant"):
            raise InputError(
                f"policy {policy.name} plans the learning rate, and so does the Trainer's "
                f"{scheduler} schedule; set lr_scheduler_type: constant"
            )


def fit_policies(
    policies: Sequence[Managed],
    metrics: Collection[str],
    max_steps: int | None,
    abilities: Collection[str],
) -> Fit:
    """Splits policies into those that can act in a run and those that cannot.

    A policy that a preset brought is left out where it cannot act. One that the user named is an
    error there, unless the training is only too short: a smoke test has the policies of the run
    that it tests.

    Args:
        policies: the policies of the run that are not off.
        metrics: names of all metrics that the run collects.
        max_steps: optimizer steps of the whole training, None if unknown.
        abilities: ``save`` and ``stop``, as far as the training can do them.

    Raises:
        InputError: a policy that the user named cannot act; the message says why.
    """
    fit = Fit()
    for policy in policies:
        reason = _why_not(policy, metrics, max_steps, abilities)
        if reason and not policy.preset:
            raise InputError(f"policy {policy.name}: {reason}")
        reason = reason or _too_short(policy, max_steps)
        if reason:
            fit.left_out[policy.name] = reason
        else:
            fit.policies.append(policy)
    return fit


def _why_not(
    policy: Managed, metrics: Collection[str], max_steps: int | None, abilities: Collection[str]
) -> str:
    for pattern in policy.needed_metrics:
        if pattern == MAX_STEPS and max_steps is None:
            return "needs the number of steps, which is not known; give watch(..., max_steps=)"
        if pattern != MAX_STEPS and not fnmatch.filter(metrics, pattern):
            return f"its metric {pattern} is not collected{_hint(pattern, metrics)}"
    if missing := (policy.action_kinds & {"save", "stop"}) - {*abilities}:
        return f"this training cannot {min(missing)}; give watch(..., save=)"
    return ""


def _too_short(policy: Managed, max_steps: int | None) -> str:
    silent = getattr(policy.policy, "steps_before_acting", 0)
    if max_steps is not None and silent >= max_steps:
        return (
            f"it will not act: it only observes for {silent} steps, and the training has "
            f"{max_steps}; lower its warmup, reference or patience"
        )
    return ""


def _hint(pattern: str, metrics: Collection[str]) -> str:
    if pattern.startswith("lora/"):
        return ": the model has no adapters; train with LoRA, or remove the policy"
    if pattern == "train/loss/total":
        return ": give the loss with observe(loss=...) at each step"
    return nearest(pattern, metrics)
