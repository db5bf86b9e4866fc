"""Policies: record history in, actions out."""

from ulysses_monitor.policies.base import Decide, Decision, Policy, PolicySet, checked_policies

__all__ = ["Decide", "Decision", "Policy", "PolicySet", "checked_policies"]
