"""Bugs that people reported in public trackers, put into small trainings again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.faults.training import Recorded, Setting

__all__ = ["REPORTED", "SIZES", "Reported", "reported"]

SIZES = (
    Setting(name="hf", rate=3e-3, width=32, layers=3, batch=4, length=20, steps=50, seed=20),
    Setting(name="hf", rate=1e-3, width=48, layers=4, batch=6, length=16, steps=60, seed=30),
)
"""Small Llamas, or small models of our own, of the two halves."""


@dataclass(frozen=True)
class Reported:
    """A bug that was reported.

    Attributes:
        name: its name here.
        links: threads in which it was reported or repaired, the first one is cited in the table.
        what: what the bug was, in one line.
        run: trains with the bug, at a size.
        onset: first step that it shows at.
        names: rules that name the cause; empty if none does.
        ranks: number of processes.
    """

    name: str
    links: tuple[str, ...]
    what: str
    run: Callable[[Setting], Recorded]
    onset: int
    names: tuple[str, ...]
    ranks: int = 1

    @property
    def thread(self) -> str:
        """The first link as trackers write it, such as ``pytorch#104336``."""
        parts = self.links[0].split("/")
        return f"{parts[-3]}#{parts[-1]}"


REPORTED: dict[str, Reported] = {}


def reported(
    *links: str, what: str, names: tuple[str, ...], onset: int = 1, ranks: int = 1
) -> Callable[[Callable[[Setting], Any]], Callable[[Setting], Any]]:
    """Declares a function that makes a training with a bug, which has a `run`.

    Args:
        links: ``owner/repository/issues/number`` on GitHub.
        what: what the bug was.
        names: rules that name its cause.
        onset: first step that it shows at.
        ranks: number of processes.
    """

    def declare(make: Callable[[Setting], Any]) -> Callable[[Setting], Any]:
        name = make.__name__
        addresses = tuple(f"https://github.com/{link}" for link in links)
        REPORTED[name] = Reported(
            name, addresses, what, lambda s: make(s).run(), onset, names, ranks
        )
        return make

    return declare
