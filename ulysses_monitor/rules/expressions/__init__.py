"""Rules as one line, ``grad/norm/total > 3 * median(50) for 5``, parsed and never `eval`ed."""

from ulysses_monitor.rules.expressions.parser import Parsed, parse
from ulysses_monitor.rules.expressions.rule import Expression, is_expression

__all__ = ["Expression", "Parsed", "is_expression", "parse"]
