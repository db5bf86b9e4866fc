"""Whether all ranks decided and acted alike; told by a few numbers in the next step's vector."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from ulysses_monitor.common.ranks import world_size
from ulysses_monitor.policies import Decision

__all__ = ["Agreement"]

_BITS = (1 << 20) - 1
_NAMES = ("steering/failed", "steering/sum", "steering/squares")


class Agreement:
    """Compares what the ranks did at a step when they next meet.

    A rank on which acting failed, or whose policies decided otherwise, would train other weights
    than the rest; so one step later all of them know, and stop acting.
    """

    def __init__(self) -> None:
        self._hash, self._failed = 0, False

    def note(self, decisions: Sequence[Decision]) -> None:
        """Notes what this rank decided at a step."""
        self._hash = 0
        if decisions and world_size() > 1:
            told = [
                (
                    d.policy,
                    d.shadow,
                    d.action.kind,
                    sorted(d.action.values.items()),
                    d.action.targets,
                )
                for d in decisions
            ]
            self._hash = zlib.crc32(repr(told).encode()) & _BITS

    def note_failure(self) -> None:
        """Notes that this rank could not act."""
        self._failed = True

    def sends(self) -> dict[str, float]:
        """This rank's numbers, to be summed over ranks."""
        return dict(zip(_NAMES, (float(self._failed), self._hash, self._hash**2), strict=True))

    def verdict(self, sums: Mapping[str, float]) -> str:
        """What is wrong with the step before, alike on all ranks; empty if nothing is."""
        failed, total, squares = (int(sums[name]) for name in _NAMES)
        if failed:
            return f"acting failed on {failed} of {world_size()} ranks"
        # By Cauchy and Schwarz equal exactly where all are; small enough to be exact in float64.
        if world_size() * squares != total**2:
            return "the ranks decided otherwise, though they saw the same numbers"
        return ""
