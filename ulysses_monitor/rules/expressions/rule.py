"""A rule that is an expression."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.settings import Text
from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule
from ulysses_monitor.rules.expressions.nodes import Condition, comparisons, readings
from ulysses_monitor.rules.expressions.parser import Parsed, parse
from ulysses_monitor.rules.history import History

__all__ = ["Expression", "is_expression"]

_COMPARES = re.compile("[<>=!]")


def is_expression(spec: Any) -> bool:
    """Whether a spec is an expression, and not a name, a path or an object."""
    return isinstance(spec, str) and _COMPARES.search(spec) is not None


@dataclass(frozen=True, kw_only=True)
class Expression(BuiltinRule):
    """Fires while an expression holds, such as ``grad/norm/total > 3 * median(50) for 5``."""

    when: Text
    """The expression; ``for N`` at its end sets `patience`."""
    name: str = ""
    """Empty: after the metric that the expression is about."""
    message: str = ""
    """What an alert says before the numbers; empty: the expression."""
    hint: str = ""
    """What to try."""
    _condition: Condition = field(init=False, repr=False, compare=False)
    _metrics: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parsed = self._parse()
        super().__post_init__()
        names = tuple(dict.fromkeys(readings(parsed.condition)))
        found: dict[str, Any] = {"_condition": parsed.condition, "_metrics": names}
        if not self.name:
            found["name"] = re.sub(r"[^\w.]+", "_", names[0].removesuffix("/total"))
        if parsed.patience is not None:
            found["patience"] = parsed.patience
        for key, value in found.items():
            object.__setattr__(self, key, value)

    def _parse(self) -> Parsed:
        where = f"rule {self.name}" if isinstance(self.name, str) and self.name else "rules"
        if not isinstance(self.when, str):
            raise InputError(f"{where}: when is {self.when!r}; expected an expression")
        shown = " ".join(self.when.split())
        try:
            parsed = parse(self.when)
        except InputError as error:
            raise InputError(f"{where}: {shown[:120]!r}: {error}") from None
        if parsed.patience is not None and self.patience not in (1, parsed.patience):
            raise InputError(
                f"{where}: patience is {self.patience}; expected what the expression says, for "
                f"{parsed.patience}, or no patience"
            )
        return parsed

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return self._metrics

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if not self._condition.holds(history):
            return []
        first = next(c for c in comparisons(self._condition) if c.holds(history) is not None)
        value, limit = first.left.value(history), first.right.value(history)
        said = self.message or " ".join(self.when.split())
        text = f"{said} ({first.subject}: {value:.4g} against {limit:.4g})"
        alert = self.alert(history, first.subject, value, limit, text)
        return [dataclasses.replace(alert, hint=self.hint) if self.hint else alert]
