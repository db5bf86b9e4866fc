"""Rules: record history in, alerts out; no tensors, no I/O."""

from ulysses_monitor.rules.base import HISTORY, Rule, RuleSet
from ulysses_monitor.rules.standard import (
    LoraImbalance,
    NoLabels,
    NonFinite,
    ReplicaDrift,
    Spike,
    VanishingGradient,
    default_rules,
    make_rules,
)

__all__ = [
    "HISTORY",
    "LoraImbalance",
    "NoLabels",
    "NonFinite",
    "ReplicaDrift",
    "Rule",
    "RuleSet",
    "Spike",
    "VanishingGradient",
    "default_rules",
    "make_rules",
]
