"""The effect of interventions: trainings without them, with them in shadow, and with them active.

    python -m benchmarks.policies [--tasks a,b] [--interventions x,y] [--seeds 8] [--jobs 2]
                                  [--output benchmarks/results/policies_cpu.md] [--raw FILE.jsonl]

Small trainings, some healthy, some with a trouble of a known kind, are done over several seeds:
with no monitor, and with each intervention. What counts is the loss on held-out data at the end,
active minus off in the same seed; the mean and its 95 % interval are told for each. In shadow, and
where an intervention never acts, all weights must be those of no monitor, bit by bit.

Tasks are in `policy_study/tasks.py`, interventions in `policy_study/interventions.py`. A study that
was killed goes on with the same `--raw`: what is done already, with the same settings, code of
policies and versions, is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.policy_study.interventions import INTERVENTIONS
from benchmarks.policy_study.jobs import Job, Row, jobs_of, read_rows, run
from benchmarks.policy_study.report import report
from benchmarks.policy_study.tasks import TASKS


def main() -> None:
    arguments = _arguments()
    tasks = _chosen(arguments.tasks, TASKS, "--tasks")
    interventions = _chosen(arguments.interventions, INTERVENTIONS, "--interventions")
    jobs = list(jobs_of(tasks.values(), range(arguments.seeds), interventions))
    rows = _rows(jobs, arguments.jobs, arguments.raw)
    text = report(jobs, rows, arguments.jobs, _command(arguments))
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text, encoding="utf-8")


def _rows(jobs: Sequence[Job], workers: int, raw: Path | None) -> list[Row]:
    """Returns the rows of all jobs in their order; runs those that an earlier study did not."""
    rows = read_rows(raw)
    left = [job for job in jobs if job.key not in rows]
    _say(f"{len(jobs)} trainings, {len(jobs) - len(left)} of them done")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="policies-") as folder:
        for number, row in enumerate(run(left, workers, Path(folder)), 1):
            rows[row["key"]] = row
            if raw is not None:
                _append(raw, json.dumps(row))
            minutes = (time.perf_counter() - began) / number * (len(left) - number) / 60
            _say(f"{number}/{len(left)}, {minutes:.0f} min left: {_in_short(row)}")
    return [rows[job.key] for job in jobs]


def _append(raw: Path, line: str) -> None:
    """Appends a line of its own, also after half a line that a killed study left."""
    with raw.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        broken = file.read() not in (b"", b"\n")
        file.write(b"\n" * broken + line.encode() + b"\n")


def _in_short(row: Row) -> str:
    what = f"{row['task']}, seed {row['seed']}, {row['kind']} {row['intervention']}"
    if row["error"]:
        return f"{what}: {row['error']}"
    return f"{what}: {row['start']:.3f} to {row['end']:.3f}, acted at {row['acted']} steps"


def _chosen(names: str | None, table: Mapping[str, Any], option: str) -> dict[str, Any]:
    if names is None:
        return dict(table)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in table:
            raise SystemExit(f"{option}: {name!r} is not known; allowed: {', '.join(table)}")
    return {name: table[name] for name in chosen}


def _command(arguments: argparse.Namespace) -> str:
    """Returns the command that repeats the study; where the files lie does not matter."""
    options = {n: getattr(arguments, n) for n in ("tasks", "interventions", "seeds", "jobs")}
    given = [f"--{name} {shlex.quote(str(v))}" for name, v in options.items() if v is not None]
    return " ".join(["python -m benchmarks.policies", *given])


def _whole(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of {least} or more")
    return int(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tasks", help="names, with commas; all if not given")
    parser.add_argument("--interventions", help="names, with commas; all if not given")
    parser.add_argument("--seeds", type=partial(_whole, least=2), default=8)
    parser.add_argument("--jobs", type=_whole, default=2, help="trainings at a time")
    parser.add_argument("--output", type=Path, help="the report; printed if not given")
    parser.add_argument("--raw", type=Path, help="a line a training; goes on with what it holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
