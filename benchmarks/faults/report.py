"""Tables of what rules said about the trainings."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from benchmarks.faults.cases import GROUPS, HALVES
from benchmarks.faults.judging import Verdict
from benchmarks.faults.reported import REPORTED

__all__ = ["report", "share"]

Verdicts = Sequence[Verdict]

_SETS: Mapping[str, Callable[[Verdict], bool]] = {
    "faults, sizes that thresholds were set on": lambda v: _is_of(v, GROUPS[0], 0),
    "faults, other sizes": lambda v: _is_of(v, GROUPS[0], 1),
    "faults of two processes, first sizes": lambda v: _is_of(v, GROUPS[1], 0),
    "faults of two processes, other sizes": lambda v: _is_of(v, GROUPS[1], 1),
    "reported bugs, first sizes": lambda v: _is_of(v, GROUPS[2], 0),
    "reported bugs, other sizes": lambda v: _is_of(v, GROUPS[2], 1),
    "all": lambda _: True,
}


def _is_of(verdict: Verdict, group: str, half: int) -> bool:
    return verdict.case.group == group and verdict.case.half == half


def report(verdicts: Mapping[str, Verdicts]) -> str:
    """Returns the tables in Markdown.

    Args:
        verdicts: of each set of rules; the first one is ours.
    """
    ours = next(iter(verdicts.values()))
    of_bugs = [v for v in ours if v.case.fault in REPORTED]
    of_faults = [v for v in ours if not v.is_healthy and v.case.fault not in REPORTED]
    parts = ["## Summary\n", _summary(verdicts)]
    parts += ["\n## Reported bugs\n", _bugs(of_bugs)] if of_bugs else []
    parts += ["\n## Each fault\n", _faults(of_faults)]
    parts += ["\n## Alerts on healthy runs\n", _false_alarms(ours)]
    return "\n".join(parts) + "\n"


def _summary(verdicts: Mapping[str, Verdicts]) -> str:
    head = ["judged by", "trainings", "caught by any alert", "by a rule that names the cause"]
    head += ["within one step", "right rule first", "median steps after onset"]
    head += ["healthy with a critical alert", "healthy with a warning", "precision"]
    rows = []
    for title, found in verdicts.items():
        is_ours = title == next(iter(verdicts))
        for name, chosen in _SETS.items():
            if of_set := [v for v in found if chosen(v)]:
                rows.append(_summary_row(title, name, of_set, is_ours))
    return _table(head, rows)


def _summary_row(title: str, name: str, found: Verdicts, is_ours: bool) -> list[str]:
    broken = [v for v in found if not v.is_healthy]
    healthy = [v for v in found if v.is_healthy]
    caught, right = [v for v in broken if v.after], [v for v in broken if v.right]
    first = [v for v in right if v.after[0].rule in v.case.names]
    at_once = [v for v in right if v.delay <= 1]
    delay = f"{statistics.median(v.delay for v in right):g}" if right else "-"
    criticals = sum(any(a.severity == "critical" for a in v.alerts) for v in healthy)
    warned = sum(bool(v.alerts) for v in healthy)
    named = [share(len(right), len(broken)), share(len(at_once), len(broken))]
    return [
        title,
        f"{name}: {len(broken)} broken, {len(healthy)} healthy",
        share(len(caught), len(broken)),
        *([*named, share(len(first), len(right)), delay] if is_ours else ["-"] * 4),
        share(criticals, len(healthy)),
        share(warned, len(healthy)),
        share(len(caught), len(caught) + warned),
    ]


def _bugs(found: Verdicts) -> str:
    rows = []
    for bug in REPORTED.values():
        first, second = (
            [v for v in found if v.case.fault == bug.name and v.case.half == half]
            for half in (0, 1)
        )
        links = f"[{bug.thread}]({bug.links[0]})"
        rows.append([links, bug.what, bug.name, _how(first), _how(second)])
    head = ["reported in", "what it was", "name here"]
    return _table([*head, "rule, steps after onset: first sizes", "other sizes"], rows)


def _faults(found: Verdicts) -> str:
    places = dict.fromkeys((v.case.fault, v.case.kind, v.case.half) for v in found)
    rows = []
    for fault, kind, half in places:
        of_place = [v for v in found if (v.case.fault, v.case.half) == (fault, half)]
        others = Counter(
            v.after[0].rule for v in of_place if v.after and v.after[0].rule not in v.case.names
        )
        first = ", ".join(f"{rule} ({n})" for rule, n in others.most_common())
        rows.append([fault, kind, HALVES[half], _how(of_place), first])
    head = ["fault", "training", "size", "rule that names the cause, steps after onset"]
    return _table([*head, "first alert, if another"], rows)


def _how(found: Verdicts) -> str:
    """Says which rule named a fault with how many seeds, and when."""
    right = [v for v in found if v.right]
    if not right:
        return "**missed**" if found else "-"
    rules = ", ".join(dict.fromkeys(v.right[0].rule for v in right))
    delays = f"{statistics.median(v.delay for v in right):g}"
    missed = f", **missed with {len(found) - len(right)} of {len(found)} seeds**"
    return f"{rules}, {delays}" + (missed if len(right) < len(found) else "")


def _false_alarms(found: Verdicts) -> str:
    rows = [
        [v.case.kind, HALVES[v.case.half], str(v.case.seed), a.severity, a.message]
        for v in found
        if v.is_healthy
        for a in v.alerts
    ]
    return _table(["training", "size", "seed", "severity", "alert"], rows) if rows else "None."


def share(part: int, whole: int) -> str:
    """Returns a share with its 95 % interval (Wilson 1927)."""
    if not whole:
        return "-"
    p, z = part / whole, 1.96
    middle = (p + z**2 / (2 * whole)) / (1 + z**2 / whole)
    half = z * math.sqrt(p * (1 - p) / whole + z**2 / (4 * whole**2)) / (1 + z**2 / whole)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{part} of {whole} ({low:.0%} to {high:.0%})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
