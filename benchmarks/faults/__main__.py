"""`python -m benchmarks.faults [--short] [--workers N] [--out FILE]`: see the package."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.faults.cases import Case, faulty, healthy
from benchmarks.faults.judging import JUDGES, Verdict, judge, report

SHORT = 6
"""Of the short form, one training of so many."""


def cases(*, short: bool) -> list[Case]:
    """Returns the trainings."""
    every = [case for half in (0, 1) for source in (healthy, faulty) for case in source(half)]
    return every[::SHORT] if short else every


def _judge_one(job: tuple[int, bool]) -> tuple[int, list[Verdict]]:
    index, short = job
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    case = cases(short=short)[index]
    recorded = case.run()
    plain = Case(case.fault, case.kind, case.half, _no_run, case.onset, tuple(case.names))
    return index, [judge(plain, recorded, rules) for rules in JUDGES.values()]


def _no_run() -> None:  # what is sent between processes needs no training
    raise NotImplementedError


def _all(jobs: list[tuple[int, bool]], workers: int) -> Iterator[tuple[int, list[Verdict]]]:
    if workers == 1:
        yield from map(_judge_one, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_judge_one, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help=f"one training of {SHORT}")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    jobs = [(i, args.short) for i in range(len(cases(short=args.short)))]
    found: dict[str, list[Verdict]] = {title: [] for title in JUDGES}
    for index, verdicts in _all(jobs, args.workers):
        for title, verdict in zip(found, verdicts, strict=True):
            found[title].append(verdict)
        print(f"{index + 1} of {len(jobs)}", flush=True)
    text = f"# Training faults\n\n{len(jobs)} trainings on a CPU.\n\n" + report(dict(found))
    print(text)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
