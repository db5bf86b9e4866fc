"""`python -m benchmarks.faults [--short] [--groups G ...] [--seeds N] [--workers N] [--out FILE]`.

The short form exits with 1 if a fault is missed or a healthy run raises a critical alert.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.faults.cases import GROUPS, SEEDS, Case, every_case
from benchmarks.faults.judging import JUDGES, Verdict, judge
from benchmarks.faults.report import report
from benchmarks.faults.short import complaints, short_cases

Job = tuple[int | None, int]
"""A seed, None for the short form, and the place of a training in it."""


def _cases(seed: int | None) -> list[Case]:
    return short_cases() if seed is None else list(every_case(seed))


def _judge_one(job: Job) -> list[Verdict]:
    seed, index = job
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case = _cases(seed)[index]
    recorded = case.run()
    plain = case.without_training()
    return [judge(plain, recorded, rules) for rules in JUDGES.values()]


def _all(jobs: list[Job], workers: int) -> Iterator[list[Verdict]]:
    if workers == 1:
        yield from map(_judge_one, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        yield from pool.map(_judge_one, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few trainings, asserted")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    seeds = [None] if args.short else list(range(args.seeds))
    jobs = [
        (seed, i)
        for seed in seeds
        for i, case in enumerate(_cases(seed))
        if case.group in args.groups
    ]
    found: dict[str, list[Verdict]] = {title: [] for title in JUDGES}
    for done, verdicts in enumerate(_all(jobs, args.workers), start=1):
        for title, verdict in zip(found, verdicts, strict=True):
            found[title].append(verdict)
        if done % 50 == 0 or done == len(jobs):
            print(f"{done} of {len(jobs)}, {time.perf_counter() - began:.0f} s", flush=True)
    text = f"# Training faults\n\n{len(jobs)} trainings on a CPU.\n\n" + report(found)
    print(text)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    if args.short and (wrong := complaints(found[next(iter(JUDGES))])):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
