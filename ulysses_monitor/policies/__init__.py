"""Policies: record history in, actions out."""

from ulysses_monitor.policies.base import Decide, OwnPolicy, Policy
from ulysses_monitor.policies.managed import Managed
from ulysses_monitor.policies.policy_set import Decision, PolicySet
from ulysses_monitor.policies.specs import POLICIES, PRESETS, check_policy_specs, make_policies

__all__ = [
    "POLICIES",
    "PRESETS",
    "Decide",
    "Decision",
    "Managed",
    "OwnPolicy",
    "Policy",
    "PolicySet",
    "check_policy_specs",
    "make_policies",
]
