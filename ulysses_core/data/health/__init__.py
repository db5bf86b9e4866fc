"""The health of a data set, on its rows as the trainer sees them; `ulysses check-data` shows it."""

from ulysses_core.data.health.check import check_health
from ulysses_core.data.health.findings import Finding, Health, Numbers

__all__ = ["Finding", "Health", "Numbers", "check_health"]
