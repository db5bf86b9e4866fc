"""The short form: trainings that are judged at every change, and what must hold of them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.faults.cases import GROUPS, Case, every_case
from benchmarks.faults.judging import Verdict

__all__ = ["SHORT", "complaints", "short_cases"]

SHORT = (
    *("rate_leaps", "layer_detached", "adapters_both_zero", "loss_not_finite"),
    *("poisoned_batch", "sides_equal", "reward_fails_silently"),
    *("noise_differs_by_rank", "same_rows_on_both_ranks", "a_parameter_not_broadcast"),
    *("optimizer_of_replaced_parameters", "compiled_step_without_guards"),
    *("checkpointing_cuts_adapters_off", "tie_lost_on_loading", "answers_cut_off"),
    *("losses_added_over_accumulation", "moved_after_ddp", "clipped_on_one_rank"),
    "each_batch_twice",
)
"""Faults that the full form catches by name with every seed: each kind of rule has one."""


def short_cases() -> list[Case]:
    """Returns these faults, in the half that thresholds were not set on, and healthy trainings."""
    every = [case for case in every_case(0) if case.half == 1]
    quiet = [
        case
        for group in GROUPS
        for case in [c for c in every if not c.fault and c.group == group][::5]
    ]
    return [*quiet, *(case for case in every if case.fault in SHORT)]


def complaints(verdicts: Sequence[Verdict]) -> list[str]:
    """Returns what must not be: a fault that no rule names, a healthy run that is critical."""
    missed = [f"{v.case.fault} was missed" for v in verdicts if not v.is_healthy and not v.right]
    loud = [
        f"a healthy run ({v.case.kind}) raised {alert.rule}: {alert.message}"
        for v in verdicts
        if v.is_healthy
        for alert in v.alerts
        if alert.severity == "critical"
    ]
    return missed + loud
