"""What the project's own rules share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ulysses_monitor.common.settings import Text, check_fields
from ulysses_monitor.records import Alert, StepRecord

__all__ = ["BuiltinRule", "worst_parameters"]


@dataclass(frozen=True, kw_only=True)
class BuiltinRule:
    """Base of the rules that come with the project: checked settings.

    Raises:
        InputError: a setting is wrong.
    """

    name: Text

    def __post_init__(self) -> None:
        check_fields(f"rule {self.name}", self)

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`."""
        raise NotImplementedError


def worst_parameters(record: StepRecord, prefix: str, most: int = 3) -> str:
    """Names the parameters with the largest values under `prefix`, at most `most` of them."""
    found = [(record[n], n.removeprefix(prefix)) for n in record.schema.match(f"{prefix}*")]
    found = sorted((pair for pair in found if pair[0]), reverse=True)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(name for _, name in found[:most]) + more
