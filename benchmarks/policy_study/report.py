"""Writes the study's result as Markdown."""

from __future__ import annotations

import os
import platform
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.policy_study.effects import Effect, Verdict, paired_effect, verdict
from benchmarks.policy_study.jobs import Job, Row
from benchmarks.policy_study.tasks import Task

__all__ = ["Result", "report", "results_of"]

HOW_TO_READ = """\
A score is the loss on held-out data at the end; where it is above the loss before the training, or
not finite, it is that loss. "off" is a training with no monitor, "without its trouble" the same
with nothing in its way. The difference is active minus off, in the same seeds; below 0 is better.
Its interval is the paired t interval of 95 %: of a hundred interventions that change the weights
and not the result, five are said to help or to hurt. "helps" and "hurts": the interval excludes 0;
"nothing": it never acted, and left all weights as they are, bit by bit. Snapshots in memory do not
count as actions. "At start": seeds in which the training ended no better than it began.
"""
VERDICTS: tuple[Verdict, ...] = ("helps", "no effect seen", "hurts", "nothing")


@dataclass(frozen=True)
class Result:
    """What an intervention did to a task.

    Attributes:
        scores: one a seed.
        effect: on the score; None where a training failed.
        verdict: in a word.
        acted_in: seeds in which it did anything.
        actions: of a run, on average.
        at_start: seeds that ended no better than they began.
        wrong: defects: trainings that failed, policies that failed, weights that differ although
            nothing was done.
    """

    scores: list[float]
    effect: Effect | None
    verdict: Verdict | None
    acted_in: int
    actions: float
    at_start: int
    wrong: list[str]


def report(jobs: Sequence[Job], rows: Sequence[Row], workers: int, command: str) -> str:
    """Writes the whole report.

    Args:
        jobs: those of the study.
        rows: what came of them.
        workers: trainings at a time.
        command: that made it.
    """
    tasks = {job.task.name: job.task for job in jobs if job.kind == "off"}
    results = {name: results_of([r for r in rows if r["task"] == name]) for name in tasks}
    header = _header(jobs, rows, workers, command)
    lines = ["# `benchmarks/policies.py`, CPU", "", _paragraph(header), "", HOW_TO_READ]
    lines += ["## All tasks", "", *_summary(results)]
    for name, task in tasks.items():
        own = [row for row in rows if row["task"] == name]
        lines += ["", f"## {name}", "", _paragraph(_about(task, own)), ""]
        lines += _table(own, results[name])
        wrong = [f"- {each}: {w}" for each, r in results[name].items() for w in r.wrong]
        lines += ["", *wrong] if wrong else []
    return "\n".join(lines) + "\n"


def results_of(rows: Sequence[Row]) -> dict[str, Result]:
    """Computes the result of each intervention on one task."""
    off = {row["seed"]: row for row in rows if row["kind"] == "off" and not row["error"]}
    active: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "active":
            active.setdefault(row["intervention"], []).append(row)
    return {name: _result(off, sorted(a, key=_seed)) for name, a in active.items()}


def _result(off: Mapping[int, Row], active: Sequence[Row]) -> Result:
    wrong = list(_wrong(off, active))
    done = [row for row in active if not row["error"] and row["seed"] in off]
    effect = word = None
    if done:
        effect = paired_effect([row["score"] - off[row["seed"]]["score"] for row in done])
        changed = any(row["weights"] != off[row["seed"]]["weights"] for row in done)
        word = verdict(effect, acted=changed or any(row["acted"] for row in done))
    return Result(
        scores=[row["score"] for row in done],
        effect=effect,
        verdict=word,
        acted_in=sum(row["acted"] > 0 for row in done),
        actions=statistics.fmean([sum(row["actions"].values()) for row in done] or [0.0]),
        at_start=sum(row["score"] == row["start"] for row in done),
        wrong=wrong,
    )


def _wrong(off: Mapping[int, Row], active: Sequence[Row]) -> Iterator[str]:
    for row in active:
        seed = row["seed"]
        if row["error"]:
            yield f"seed {seed}: not trained: {row['error']}"
            continue
        if row["defects"]:
            count = len(row["defects"])
            yield f"seed {seed}: {count} errors logged, the first: {row['defects'][0]}"
        if row["stopped"]:
            yield f"seed {seed}: stopped early: {row['stopped']}"
        if not row["acted"] and seed in off and row["weights"] != off[seed]["weights"]:
            yield f"seed {seed}: nothing was done, and yet the weights differ"


def _header(jobs: Sequence[Job], rows: Sequence[Row], workers: int, command: str) -> Iterator[str]:
    seeds = sorted({job.seed for job in jobs})
    hours = sum(row["job_seconds"] for row in rows) / 3600
    yield f"{_processor()}, {os.cpu_count()} cores; torch {torch.__version__}, Python"
    yield f"{platform.python_version()}; fp32, 1 thread a training, {workers} at a time;"
    yield f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}); {len(rows):,} trainings,"
    yield f"{hours:.2f} hours in all. `{command}`"


def _paragraph(sentences: Iterable[str]) -> str:
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False, break_long_words=False)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _summary(results: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    yield f"| intervention | {' | '.join(VERDICTS)} |"
    yield "|---" * (1 + len(VERDICTS)) + "|"
    names = dict.fromkeys(name for of_task in results.values() for name in of_task)
    for name in names:
        found = {task: of_task[name] for task, of_task in results.items() if name in of_task}
        cells = (", ".join(_of_verdict(found, word)) for word in VERDICTS)
        yield f"| {name} | {' | '.join(cell or '-' for cell in cells)} |"


def _of_verdict(results: Mapping[str, Result], word: Verdict) -> Iterator[str]:
    for task, result in results.items():
        if result.verdict == word and result.effect is not None:
            size = f" ({result.effect.mean:+.3f})" if word in ("helps", "hurts") else ""
            yield f"{task}{size}"


def _about(task: Task, rows: Sequence[Row]) -> Iterator[str]:
    yield f"{task.about} {task.steps} steps, {task.optimizer}, peak rate {task.lr:g},"
    yield f"{task.schedule} after {task.warmup} steps of warm-up;"
    yield f"clipped to norm {task.clip:g}." if task.clip else "not clipped by the loop."
    done = [row for row in rows if row["kind"] == "off" and not row["error"]]
    if done:
        yield f"Loss before it: {statistics.fmean(row['start'] for row in done):.3f}. A training"
        yield f"takes {statistics.median(row['seconds'] for row in done):.1f} s with no monitor."
    off = {row["seed"]: row.get("weights") for row in rows if row["kind"] == "off"}
    shadow = [row for row in rows if row["kind"] == "shadow" and not row["error"]]
    differ = [r for r in shadow if r["weights"] != off.get(r["seed"])]
    if shadow:
        yield "In shadow: weights as with no monitor, bit by bit, in"
        yield f"{len(shadow) - len(differ)} of {len(shadow)} trainings."
    for row in differ:
        yield f"**They differ with {row['intervention']} in shadow, seed {row['seed']}.**"


def _table(rows: Sequence[Row], results: Mapping[str, Result]) -> Iterator[str]:
    yield (
        "| intervention | score: mean [range] | difference | 95 % interval | seeds it acted in "
        "| actions a run | at start | verdict |"
    )
    yield "|---" * 8 + "|"
    for kind, name in (("off", "off"), ("sound", "without its trouble")):
        done = [row for row in rows if row["kind"] == kind and not row["error"]]
        if done:
            stuck = sum(row["score"] == row["start"] for row in done)
            yield f"| {name} | {_spread([r['score'] for r in done])} | | | | | {stuck} | |"
    for name, result in results.items():
        yield _line(name, result)


def _line(name: str, result: Result) -> str:
    effect = result.effect
    if effect is None:
        return f"| {name} | not trained | | | | | | |"
    cells = [
        name,
        _spread(result.scores),
        f"{effect.mean:+.4f}",
        f"[{effect.low:+.4f}, {effect.high:+.4f}]" if effect.seeds > 1 else "-",
        f"{result.acted_in} of {effect.seeds}",
        f"{result.actions:,.1f}",
        str(result.at_start),
        str(result.verdict),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def _seed(row: Row) -> int:
    return int(row["seed"])
