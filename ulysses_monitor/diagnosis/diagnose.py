"""What happened in a run and why: the probable root cause, what followed, what was not checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ulysses_monitor.common.formatting import change, count, number
from ulysses_monitor.diagnosis.causality import Chain, find_chains
from ulysses_monitor.diagnosis.checks import Checks, make_checks
from ulysses_monitor.diagnosis.curves import Curve, read_curves
from ulysses_monitor.diagnosis.findings import collect_alerts, make_findings
from ulysses_monitor.diagnosis.replay import RuleReplay, replay_rules, trained_steps
from ulysses_monitor.diagnosis.timeline import Moment, list_moments
from ulysses_monitor.reading import Failure, RunReader, read_failure
from ulysses_monitor.rules import default_rules

__all__ = ["Diagnosis", "Verdict", "diagnose"]

Verdict = Literal["critical", "warning", "info", "fine", "unknown"]
"""The worst that was found; ``fine`` if nothing was, ``unknown`` if there was nothing to check."""

_VERDICTS: Sequence[Verdict] = ("critical", "warning", "info")
_ENDS: Mapping[str, str] = {
    "running": "The run is still training: this is what it says so far.",
    "crashed": "The process was killed or crashed: up to a second of its records may be missing.",
}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A diagnosis.

    Attributes:
        run: path or URL.
        status: ``finished``, ``stopped``, ``failed``, ``crashed``, ``running`` or ``unknown``.
        about: engine, number of processes and the like, in words.
        first: the first recorded step; 0 if there is none.
        last: the last recorded step.
        planned: number of planned steps.
        verdict: the worst that was found.
        headline: the result in a sentence or two.
        chains: what was found, with the probable cause first.
        moments: what happened, in order.
        checks: what became of each rule.
        notes: what limits this diagnosis.
        curves: the course of the metrics that findings are about.
        failure: why the run failed.
    """

    run: str
    status: str
    about: str
    first: int
    last: int
    planned: int | None
    verdict: Verdict
    headline: str
    chains: Sequence[Chain]
    moments: Sequence[Moment]
    checks: Checks
    notes: Sequence[str]
    curves: Mapping[str, Curve]
    failure: Failure | None


def diagnose(run: RunReader) -> Diagnosis:
    """Says what happened in a run and why.

    The alerts that the run recorded count. Rules that were not active, or whose alerts may be lost,
    are replayed over its records.

    Args:
        run: a finished, failed, crashed or running one, damaged or not, of this or another tool.

    Raises:
        InputError: the run's description cannot be read.
    """
    info, rules = run.info, default_rules()
    steps = [int(step) for step in trained_steps(run)]
    replayed = replay_rules(run, rules)
    findings = make_findings(run, collect_alerts(run, replayed), rules)
    chains, failure = find_chains(findings), read_failure(run)
    known = [rule.name for rule in rules]
    verdict = _judge(chains, failure, steps)
    last = steps[-1] if steps else 0
    return Diagnosis(
        run=str(run),
        status=str(info["status"]),
        about=_describe(info),
        first=steps[0] if steps else 0,
        last=last,
        planned=_as_int(info.get("max_steps")),
        verdict=verdict,
        headline=_write_headline(run, chains, failure, steps),
        chains=chains,
        moments=list_moments(run, findings, failure, last),
        checks=make_checks(known, [f.rule for f in findings], _unchecked(known, replayed)),
        notes=list(_list_notes(run, info, replayed)),
        curves=read_curves(run, findings),
        failure=failure,
    )


def _unchecked(rules: Sequence[str], replayed: RuleReplay) -> Mapping[str, str]:
    if not replayed.steps:
        return dict.fromkeys(rules, "no steps were recorded")
    return replayed.unchecked


def _describe(info: Mapping[str, Any]) -> str:
    model, size = info.get("model"), _as_int(info.get("world_size"))
    parts = [
        str(model["class"]) if isinstance(model, Mapping) and "class" in model else "",
        str(info["engine"]) if info.get("engine") else "",
        f"{size:,} process{'es' * (size != 1)}" if size else "",
    ]
    return ", ".join(part for part in parts if part)


def _judge(chains: Sequence[Chain], failure: Failure | None, steps: Sequence[int]) -> Verdict:
    found = min((chain.badness for chain in chains), default=None)
    if failure is not None:
        return "critical"
    if found is not None:
        return _VERDICTS[found]
    return "fine" if steps else "unknown"


def _write_headline(
    run: RunReader, chains: Sequence[Chain], failure: Failure | None, steps: Sequence[int]
) -> str:
    failed = f"The run failed after step {failure.step:,}: {failure.error}." if failure else ""
    serious = [chain for chain in chains if _VERDICTS[chain.badness] != "info"]
    if serious:
        return f"{_tell(serious[0])} {failed}".strip()
    if failed:
        return f"{failed} No rule saw a cause in its metrics."
    if not steps:
        return "No steps were recorded, so nothing could be checked."
    notes = f" {_tell(chains[0])}" if chains else ""
    return f"Nothing looks broken: {_describe_course(run, steps)}.{notes}"


def _tell(chain: Chain) -> str:
    """Tells a chain in two sentences: what began it, and what followed."""
    root = chain.root
    said = root.message or f"Step {root.step}: {root.rule}."
    if not chain.followers:
        return said
    worst = sorted(chain.followers, key=lambda each: (each.badness, each.since))[:3]
    told = [f"{each.rule} (step {each.since:,})" for each in sorted(worst, key=lambda e: e.since)]
    more = len(chain.followers) - len(told)
    return f"{said} What probably followed: {', '.join(told)}{f' and {more} more' if more else ''}."


def _describe_course(run: RunReader, steps: Sequence[int]) -> str:
    summary = run.summary()
    loss = change(summary["loss_first"], summary["loss_last"])
    course = "" if summary["loss_first"] is None else f", the loss went {loss}"
    return f"{count(len(steps))} steps were recorded{course}"


def _list_notes(run: RunReader, info: Mapping[str, Any], replayed: RuleReplay) -> list[str]:
    notes = [_ENDS[status]] if (status := str(info["status"])) in _ENDS else []
    if info.get("rules") == []:
        notes.append(
            "The run was recorded without rules; the default rules were replayed over its records."
        )
    elif "rules" not in info and replayed.steps:
        notes.append(
            "The run does not say which rules were active; the default ones were replayed."
        )
    notes += [
        f"{name} is damaged; what is left of it was checked: {why}"
        for name, why in run.damaged.items()
    ]
    dropped = run.names("monitor/dropped_records/*")
    block = run.block(*dropped, missing="ignore") if dropped else None
    for place, name in enumerate(block.names if block is not None else ()):
        assert block is not None  # noqa: S101 - it has names
        lost = max(block.values[block.present[:, place], place].tolist(), default=0.0)
        if lost > 0:
            notes.append(f"{name.rpartition('/')[2]} lost {number(lost, 4)} records: a slow disk?")
    return notes


def _as_int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
