"""Policies: record history in, actions out."""

from ulysses_monitor.policies.base import BuiltinPolicy, Decide, Policy
from ulysses_monitor.policies.managed import Managed
from ulysses_monitor.policies.policy_set import Decision, PolicySet
from ulysses_monitor.policies.specs import POLICIES, PRESETS, check_policies, make_policies

__all__ = [
    "POLICIES",
    "PRESETS",
    "BuiltinPolicy",
    "Decide",
    "Decision",
    "Managed",
    "Policy",
    "PolicySet",
    "check_policies",
    "make_policies",
]
