"""A diagnosis as one JSON object of at most 2,000 tokens, for programs and language models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ulysses_monitor.diagnosis.causality import Chain
from ulysses_monitor.diagnosis.checks import group_reasons
from ulysses_monitor.diagnosis.curves import find_metric
from ulysses_monitor.diagnosis.diagnose import Diagnosis
from ulysses_monitor.diagnosis.findings import Finding

__all__ = ["LIMIT", "summarize_diagnosis"]

LIMIT = 8000
"""Characters of the JSON text: about 2,000 tokens."""


@dataclass(frozen=True)
class _Room:
    """How much of each list and text to tell."""

    causes: int
    followers: int
    moments: int
    notes: int
    names: int
    text: int


_ROOMS = (
    _Room(causes=6, followers=12, moments=30, notes=10, names=80, text=300),
    _Room(causes=4, followers=8, moments=16, notes=6, names=80, text=200),
    _Room(causes=3, followers=6, moments=10, notes=4, names=16, text=140),
    _Room(causes=2, followers=4, moments=6, notes=3, names=6, text=100),
    _Room(causes=1, followers=2, moments=3, notes=2, names=3, text=60),
)


def summarize_diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    """Returns a diagnosis for JSON, in at most `LIMIT` characters if it is written without indents.

    ``cut`` says how much of which list was left out; texts that were cut end in ``...``.
    """
    for room in _ROOMS:
        made = _Writer(diagnosis, room).write()
        if len(json.dumps(made)) <= LIMIT:
            break
    return made


class _Writer:
    """Writes a diagnosis with a given room, and counts what it leaves out."""

    def __init__(self, diagnosis: Diagnosis, room: _Room) -> None:
        self._diagnosis = diagnosis
        self._room = room
        self._cut: dict[str, int] = {}

    def write(self) -> dict[str, Any]:
        d, room = self._diagnosis, self._room
        found: dict[str, Any] = {
            "run": self._short(d.run),
            "status": d.status,
            "about": self._short(d.about),
            "steps": {"first": d.first, "last": d.last, "planned": d.planned},
            "verdict": d.verdict,
            "headline": self._short(d.headline, 3),
            "causes": [self._chain(c) for c in self._some("causes", d.chains, room.causes)],
            "timeline": [
                [moment.step, moment.kind, self._short(moment.text)]
                for moment in self._some("timeline", d.moments, room.moments)
            ],
            "quiet": list(self._some("quiet", d.checks.quiet, room.names)),
            "not_checked": dict(self._unchecked()),
            "notes": [self._short(note) for note in self._some("notes", d.notes, room.notes)],
        }
        if d.failure is not None:
            found["error"] = self._short(d.failure.error, 2)
        return found | {"cut": self._cut}

    def _chain(self, chain: Chain) -> dict[str, Any]:
        root = chain.root
        followers = self._some("followed_by", chain.followers, self._room.followers)
        return {
            **self._finding(root),
            "likely": [self._short(cause) for cause in root.causes],
            "try": self._short(root.hint),
            "page": root.page,
            "followed_by": [
                self._finding(each) | {"because_of": chain.because[each.rule]} for each in followers
            ],
        }

    def _finding(self, finding: Finding) -> dict[str, Any]:
        found = {
            "rule": finding.rule,
            "severity": finding.severity,
            "began": finding.earliest,
            "noticed": finding.step,
            "metric": finding.metric,
            "value": _json_number(finding.value),
            "threshold": _json_number(finding.threshold),
            "message": self._short(finding.message),
        }
        if finding.where:
            found["where"] = self._short(finding.where)
        if finding.count > 1:
            found |= {"alerts": finding.count, "last": finding.last}
        if finding.is_replayed:
            found["replayed"] = True
        return found | self._course(finding)

    def _course(self, finding: Finding) -> dict[str, Any]:
        curves = self._diagnosis.curves
        curve = curves.get(find_metric(finding, frozenset(curves)))
        if curve is None:
            return {}
        course = (curve.first, curve.before(finding.since), curve.last)
        return {"first_before_last": [_json_number(value) for value in course]}

    def _unchecked(self) -> Iterator[tuple[str, list[str]]]:
        for reason, rules in group_reasons(self._diagnosis.checks.unchecked).items():
            yield self._short(reason), list(self._some("not_checked", rules, self._room.names))

    def _some(self, name: str, items: Sequence[Any], most: int) -> Sequence[Any]:
        if len(items) > most:
            self._cut[name] = self._cut.get(name, 0) + len(items) - most
        return items[:most]

    def _short(self, text: str, times: int = 1) -> str:
        most = times * self._room.text
        return text if len(text) <= most else f"{text[: most - 3]}..."


def _json_number(value: float) -> float | str | None:
    """Returns four digits of a number; NaN and Inf as text, as in events.jsonl."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)
