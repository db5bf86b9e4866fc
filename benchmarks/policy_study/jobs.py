"""The trainings of a study: lists them, runs them, and keeps their results."""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import platform
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

import ulysses_monitor as um
from benchmarks.policy_study.interventions import INTERVENTIONS, Intervention
from benchmarks.policy_study.tasks import Task
from benchmarks.policy_study.training import train

__all__ = ["Job", "Kind", "Row", "jobs_of", "read_rows", "run", "run_job"]

Kind = Literal["off", "sound", "shadow", "active"]
"""No monitor; no monitor and no trouble; policies in shadow; policies that act."""
Row = Mapping[str, Any]
"""A finished job, as a line of the raw file."""

PATIENCE = 900
"""Seconds within which at least one training must end."""
_OWN_CODE = ("problems.py", "texts.py", "training.py")
_STEERING_CODE = ("actions", "policies", "steering")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    task: Task
    seed: int
    kind: Kind
    intervention: str = ""
    policies: Sequence[Any] = ()

    @property
    def key(self) -> str:
        """The same for jobs with the same settings, code and versions, which must agree."""
        code = _code("own") + (_code("steering") if self.kind in ("shadow", "active") else "")
        settings = asdict(self)
        settings["task"].pop("about")
        about = [settings, code, torch.__version__, platform.python_version()]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def jobs_of(
    tasks: Iterable[Task],
    seeds: Sequence[int],
    interventions: Mapping[str, Intervention] = INTERVENTIONS,
) -> Iterator[Job]:
    """Lists all trainings of a study.

    Each intervention is trained in shadow, too, once a task: the seeds take turns. A task to which
    none goes is left out.
    """
    for task in tasks:
        chosen = [
            partial(Job, task=task, intervention=name, policies=each.policies)
            for name, each in interventions.items()
            if each.goes_to(task.name)
        ]
        if not chosen:
            continue
        for seed in seeds:
            yield Job(task=task, seed=seed, kind="off")
            if task.sound:
                yield Job(task=task.without_trouble(), seed=seed, kind="sound")
        for number, job in enumerate(chosen):
            yield job(kind="shadow", seed=seeds[number % len(seeds)])
            for seed in seeds:
                yield job(kind="active", seed=seed)


def run_job(job: Job, folder: Path) -> Row:
    """Runs one job.

    Args:
        job: which.
        folder: keeps what trainings share.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)
    watched = job.kind in ("shadow", "active")
    row = {"task": job.task.name, "seed": job.seed, "kind": job.kind}
    row |= {"intervention": job.intervention, "error": None}
    try:
        policies = job.policies if watched else None
        outcome = train(job.task, job.seed, folder, policies=policies, shadow=job.kind == "shadow")
        row |= asdict(outcome)
    except Exception as error:  # noqa: BLE001 - the report says which trainings failed, and why
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"job_seconds": time.perf_counter() - began}


def run(jobs: Sequence[Job], workers: int, folder: Path) -> Iterator[Row]:
    """Runs jobs in processes of one thread each; yields rows as they finish.

    Raises:
        multiprocessing.TimeoutError: no training ended in `PATIENCE` seconds; a process may have
            been killed for memory.
    """
    keys = [job.key for job in jobs]  # as the code was when the study began
    with multiprocessing.get_context("spawn").Pool(workers, _leave_interrupts_alone) as pool:
        rows = pool.imap_unordered(partial(_numbered, folder=folder), enumerate(jobs))
        for _ in jobs:
            number, row = rows.next(PATIENCE)
            yield {**row, "key": keys[number]}


def _numbered(job: tuple[int, Job], folder: Path) -> tuple[int, Row]:
    return job[0], run_job(job[1], folder)


def _leave_interrupts_alone() -> None:
    """Ignores signals: the parent ends its processes itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_rows(raw: Path | None) -> dict[str, Row]:
    """Reads an earlier study's rows by their jobs' keys, without those that ended in an error."""
    if raw is None or not raw.exists():
        return {}
    rows: dict[str, Row] = {}
    for line in raw.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the last line of a study that was killed
            continue
        if row["error"] is None:
            rows[row["key"]] = row
    return rows


@cache
def _code(part: Literal["own", "steering"]) -> str:
    """Digests the code that results depend on; comments do not count."""
    if part == "own":
        files = [Path(__file__).with_name(name) for name in _OWN_CODE]
    else:
        package = Path(um.__file__).parent
        files = [f for name in _STEERING_CODE for f in sorted((package / name).rglob("*.py"))]
        files += sorted((package / "policies").rglob("*.yaml"))
    digest = hashlib.sha256()
    for file in files:
        text = file.read_text(encoding="utf-8")
        digest.update((ast.dump(ast.parse(text)) if file.suffix == ".py" else text).encode())
    return digest.hexdigest()
