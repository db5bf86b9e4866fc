"""The project's own rules: each is a kind with settings, and the words of its page."""

from __future__ import annotations

from collections.abc import Mapping

from ulysses_monitor.rules.book import (
    data,
    early,
    layers,
    lora,
    movement,
    numbers,
    optimizer,
    policy,
    preferences,
    ranks,
    rewards,
    schedule,
    system,
)
from ulysses_monitor.rules.builtin import Entry

__all__ = ["BOOK"]

_FAMILIES = (
    numbers,
    layers,
    movement,
    lora,
    schedule,
    optimizer,
    ranks,
    data,
    system,
    policy,
    rewards,
    preferences,
    early,
)

BOOK: Mapping[str, Entry] = {each.name: each for family in _FAMILIES for each in family.ENTRIES}
"""Every rule of the project, by name."""
