"""Rules: record history in, alerts out; no tensors, no I/O."""

from ulysses_monitor.rules.base import HISTORY, Rule, RuleSet, Timing
from ulysses_monitor.rules.book import BOOK
from ulysses_monitor.rules.expressions import Expression
from ulysses_monitor.rules.history import History
from ulysses_monitor.rules.specs import PROFILES, RULES, check_rules, default_rules, make_rules

__all__ = [
    "BOOK",
    "HISTORY",
    "PROFILES",
    "RULES",
    "Expression",
    "History",
    "Rule",
    "RuleSet",
    "Timing",
    "check_rules",
    "default_rules",
    "make_rules",
]
