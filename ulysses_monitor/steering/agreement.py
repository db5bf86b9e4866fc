"""Checks that all ranks decided and acted alike, with a few numbers in the next step's vector."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from ulysses_monitor.common.ranks import world_size
from ulysses_monitor.policies import Outcome
from ulysses_monitor.records import Alert

__all__ = ["Agreement", "disagreement_alert"]

_BITS = (1 << 20) - 1
_NAMES = ("steering/failed", "steering/sum", "steering/squares")


class Agreement:
    """Compares what the ranks did at a step when they next meet.

    A rank on which acting failed, or whose policies decided something else, would train different
    weights. One step later all ranks know it and stop acting.
    """

    def __init__(self) -> None:
        self._hash, self._failed = 0, False

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """Remembers what this rank decided at a step."""
        self._hash = 0
        if outcomes and world_size() > 1:
            decided = [
                (o.policy, o.mode, o.action.kind, sorted(o.action.values.items()), o.action.targets)
                for o in outcomes
            ]
            self._hash = zlib.crc32(repr(decided).encode()) & _BITS

    def note_failure(self) -> None:
        """Remembers that this rank could not act."""
        self._failed = True

    def collect_sums(self) -> dict[str, float]:
        """Returns this rank's numbers, to be summed over ranks."""
        return dict(zip(_NAMES, (float(self._failed), self._hash, self._hash**2), strict=True))

    def find_difference(self, sums: Mapping[str, float]) -> str:
        """Returns what went wrong at the step before, the same on all ranks; empty if nothing did.

        Args:
            sums: `collect_sums` over all ranks.
        """
        failed, total, squares = (int(sums[name]) for name in _NAMES)
        if failed:
            return f"acting failed on {failed} of {world_size()} ranks"
        # Cauchy-Schwarz: equal only if all hashes are; 20 bits keep squares exact in float64.
        if world_size() * squares != total**2:
            return "the ranks decided differently from the same numbers"
        return ""


def disagreement_alert(step: int, difference: str) -> Alert:
    """Returns the alert that ranks did not act alike at the step before `step`."""
    return Alert(
        rule="policies_disagree",
        step=step,
        metric="policies",
        value=1.0,
        threshold=0.0,
        message=f"Step {step}: at the step before, {difference}. Policies are off, and the "
        "replicas may differ.",
        hint="Go back to the last checkpoint; look for a policy that reads more than the history.",
        severity="critical",
    )
