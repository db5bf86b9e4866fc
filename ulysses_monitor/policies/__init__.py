"""Policies: record history in, actions out; no tensors, no I/O."""

from ulysses_monitor.policies.base import BuiltinPolicy, Decide, Policy
from ulysses_monitor.policies.fitting import Fit, check_conflicts, fit_policies
from ulysses_monitor.policies.managed import Managed
from ulysses_monitor.policies.outcome import Outcome
from ulysses_monitor.policies.policy_set import PolicySet
from ulysses_monitor.policies.specs import POLICIES, PRESETS, check_policies, make_policies
from ulysses_monitor.policies.view import policy_view

__all__ = [
    "POLICIES",
    "PRESETS",
    "BuiltinPolicy",
    "Decide",
    "Fit",
    "Managed",
    "Outcome",
    "Policy",
    "PolicySet",
    "check_conflicts",
    "check_policies",
    "fit_policies",
    "make_policies",
    "policy_view",
]
