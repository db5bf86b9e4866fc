"""Rules: record history in, alerts out; no tensors, no I/O."""

from ulysses_monitor.rules.base import HISTORY, Rule, RuleSet
from ulysses_monitor.rules.sanity import NoLabels, NonFinite, ReplicaDrift
from ulysses_monitor.rules.specs import RULES, check_rules, default_rules, make_rules
from ulysses_monitor.rules.trends import LoraImbalance, Spike, VanishingGradient

__all__ = [
    "HISTORY",
    "RULES",
    "LoraImbalance",
    "NoLabels",
    "NonFinite",
    "ReplicaDrift",
    "Rule",
    "RuleSet",
    "Spike",
    "VanishingGradient",
    "check_rules",
    "default_rules",
    "make_rules",
]
