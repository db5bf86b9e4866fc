"""What happened in a run, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ulysses_monitor.common.formatting import number
from ulysses_monitor.diagnosis.findings import Finding
from ulysses_monitor.reading import Failure, RunReader
from ulysses_monitor.report.tables import summarize_actions

__all__ = ["Moment", "list_moments"]

_ORDER = ("start", "eval", "checkpoint", "alert", "action", "control", "monitor", "damage", "stop")
_EVAL = "eval/loss/total"
_AT_MOST = 3
"""Evaluations, checkpoints and notes of the monitor that are told one by one."""
_SKIPPED = ("kind", "step", "time")


@dataclass(frozen=True)
class Moment:
    """Something that happened.

    Attributes:
        step: the optimizer step.
        kind: ``start``, ``alert``, ``action``, ``control``, ``eval``, ``checkpoint``, ``monitor``,
            ``damage`` or ``stop``.
        text: what, in plain words.
        severity: of an alert.
    """

    step: int
    kind: str
    text: str
    severity: str = ""


def list_moments(
    run: RunReader, findings: Sequence[Finding], failure: Failure | None, last: int
) -> list[Moment]:
    """Returns what happened in a run, by step.

    Args:
        run: the run.
        findings: what rules found.
        failure: why it failed.
        last: the last recorded step.
    """
    events = run.event_list()
    found = [
        *_starts(_of_kind(events, "start")),
        *map(_alert, findings),
        *map(_action, summarize_actions(run)),
        *_each("control", _of_kind(events, "control"), len(events)),
        *_each("checkpoint", _of_kind(events, "checkpoint"), _AT_MOST),
        *_each("monitor", _of_kind(events, "monitor"), _AT_MOST),
        *_evaluations(run),
        *(Moment(last, "damage", f"{name} is damaged: {why}") for name, why in run.damaged.items()),
        *_end(run, events, failure, last),
    ]
    return sorted(found, key=lambda moment: (moment.step, _ORDER.index(moment.kind)))


def _of_kind(events: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["kind"] == kind]


def _step(event: Mapping[str, Any]) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _starts(events: Sequence[Mapping[str, Any]]) -> Iterator[Moment]:
    for event in events:
        step, planned = _step(event), event.get("max_steps")
        what = f"resumed after step {step:,}" if step else "started"
        size = event.get("world_size")
        processes = f"{size} process{'es' * (size != 1)}" if isinstance(size, int) else ""
        engine = str(event.get("engine") or "")
        steps = f"{planned:,} steps planned" if isinstance(planned, int) else ""
        parts = [part for part in (engine, processes, steps) if part]
        yield Moment(step, "start", f"{what}: {', '.join(parts)}" if parts else what)


def _alert(finding: Finding) -> Moment:
    more = f" ({finding.count} alerts, the last at step {finding.last:,})"
    text = f"{finding.rule}: {finding.message}" + (more if finding.count > 1 else "")
    return Moment(finding.since, "alert", text, finding.severity)


def _action(action: Mapping[str, Any]) -> Moment:
    first, last, steps = (int(action[key] or 0) for key in ("first", "last", "steps"))
    did = "" if action["mode"] == "active" else " (shadow: nothing was changed)"
    when = "" if steps == 1 else f" at {steps:,} steps, the last {last:,}"
    text = f"{action['policy']}: {action['action']}{when}{did}: {action['reason']}"
    return Moment(first, "action", text)


def _each(kind: str, events: Sequence[Mapping[str, Any]], most: int) -> Iterator[Moment]:
    """Yields events one by one; of more than `most` the first and the last."""
    if len(events) <= most:
        for event in events:
            yield Moment(_step(event), kind, _details(event) or kind)
        return
    yield Moment(_step(events[0]), kind, f"the first of {len(events):,}: {_details(events[0])}")
    yield Moment(_step(events[-1]), kind, f"the last: {_details(events[-1])}")


def _details(event: Mapping[str, Any]) -> str:
    given = {key: value for key, value in event.items() if key not in _SKIPPED and value != ""}
    return ", ".join(f"{key} {_short(value)}" for key, value in given.items())


def _short(value: object, most: int = 120) -> str:
    text = number(value, 4) if isinstance(value, float) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _evaluations(run: RunReader) -> Iterator[Moment]:
    block = run.block(_EVAL, missing="ignore")
    losses = block.values[:, 0].tolist() if block.names else []
    told: dict[int, str] = {}
    if losses:
        best = min(range(len(losses)), key=lambda i: (losses[i] != losses[i], losses[i]))
        told = {0: "the first", len(losses) - 1: "the last", best: "the best"}
    for i, which in sorted(told.items()):
        name = "the only evaluation" if len(losses) == 1 else f"{which} of {len(losses)}"
        yield Moment(int(block.steps[i]), "eval", f"held-out loss {number(losses[i], 4)}, {name}")


def _end(
    run: RunReader, events: Sequence[Mapping[str, Any]], failure: Failure | None, last: int
) -> Iterator[Moment]:
    status, stops = str(run.info.get("status")), _of_kind(events, "stop")
    if status == "crashed":
        yield Moment(last, "stop", "the recording ends here: the process was killed or crashed")
        return
    if status not in ("finished", "stopped", "failed"):
        return
    stop = stops[-1] if stops else {}
    why = failure.error if failure else str(stop.get("reason") or "")
    step = max(last, _step(stop))
    yield Moment(step, "stop", f"{status} after step {step:,}" + (f": {why}" if why else ""))
