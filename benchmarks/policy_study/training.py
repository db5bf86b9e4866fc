"""One training of a task: without a monitor, with policies in shadow, or with policies that act."""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ulysses_monitor as um
from benchmarks.policy_study.problems import PROBLEMS, Problem, held_out_loss
from benchmarks.policy_study.tasks import Task

__all__ = ["Outcome", "score_of", "train"]

IDLE = ("save", "snapshot")
"""Actions that leave the training as it is."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a training."""

    start: float
    """The held-out loss before it."""
    end: float
    """And after it."""
    score: float
    """See `score_of`."""
    weights: str
    """A digest of all weights, bit by bit."""
    actions: dict[str, int]
    """Actions asked for, by policy and kind, without those of `IDLE`."""
    acted: int
    """Number of steps with at least one."""
    stopped: str | None
    """Why a policy ended the training early."""
    defects: list[str]
    """Errors that the monitor logged: a policy that failed did not act."""
    seconds: float
    """The training alone."""


def score_of(start: float, end: float) -> float:
    """Returns the end's held-out loss, or the start's if that is less or the end is not finite."""
    return min(start, end) if math.isfinite(end) else start


def train(
    task: Task,
    seed: int,
    folder: Path,
    *,
    policies: Sequence[Any] | None = None,
    shadow: bool = False,
) -> Outcome:
    """Trains a task.

    Args:
        task: which.
        seed: of the model, of the order of data, of poison and of policies' noise.
        folder: keeps what trainings share.
        policies: as `ulysses_monitor.Monitor` takes them; None trains without a monitor.
        shadow: whether policies only say what they would do.
    """
    problem = PROBLEMS[task.problem](seed, folder, **task.settings)
    start = held_out_loss(problem)
    with tempfile.TemporaryDirectory(dir=folder) as runs, _errors_logged() as defects:
        monitor = None if policies is None else _monitor(Path(runs), policies, shadow, seed)
        began = time.perf_counter()
        _train(task, problem, seed, monitor)
        seconds = time.perf_counter() - began
        events = _actions(monitor) if monitor else []
    end = held_out_loss(problem)
    return Outcome(
        start=start,
        end=end,
        score=score_of(start, end),
        weights=_digest(problem.model),
        actions=dict(Counter(f"{e['policy']}: {e['action']}" for e in events)),
        acted=len({e["step"] for e in events}),
        stopped=monitor.stopped if monitor else None,
        defects=defects,
        seconds=seconds,
    )


def _monitor(folder: Path, policies: Sequence[Any], shadow: bool, seed: int) -> um.Monitor:
    return um.Monitor(
        folder / "run",
        policies=policies,
        shadow=shadow,
        seed=seed,
        tensorboard=False,
        rules=[],
        sample_every=10,
    )


def _actions(monitor: um.Monitor) -> list[dict[str, Any]]:
    events = um.open_run(monitor.run_dir).event_list("action")
    return [event for event in events if event["action"] not in IDLE]


def _train(task: Task, problem: Problem, seed: int, monitor: um.Monitor | None) -> None:
    optimizer = _optimizer(task, problem.model)
    if monitor is None:
        _steps(task, problem, seed, optimizer, None)
    else:
        with monitor.watch(problem.model, optimizer, max_steps=task.steps):
            _steps(task, problem, seed, optimizer, monitor)


def _steps(
    task: Task,
    problem: Problem,
    seed: int,
    optimizer: torch.optim.Optimizer,
    monitor: um.Monitor | None,
) -> None:
    model, generator = problem.model, torch.Generator().manual_seed(seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(task, done))
    poisoned = task.poison.steps(seed, task.steps) if task.poison else {}
    for step in range(1, task.steps + 1):
        rows = problem.batch(generator)
        if step in poisoned:
            rows = _random_bytes(rows, seed, step)
        loss = problem.loss(model, rows) * poisoned.get(step, 1.0)
        loss.backward()
        if monitor is not None:
            monitor.observe(loss=loss.detach(), tokens=rows.numel())
            monitor.before_clip()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def _random_bytes(rows: Tensor, seed: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_000 * (seed + 1) + step)
    return torch.randint(0, 256, rows.shape, generator=generator)


def _optimizer(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if task.optimizer == "sgd":
        return torch.optim.SGD(trained, task.lr, momentum=0.9)
    return torch.optim.AdamW(trained, task.lr)


def _rate(task: Task, done: int) -> float:
    """Returns the share of the peak rate that the step after `done` steps uses."""
    if done < task.warmup:
        return (done + 1) / task.warmup
    if task.schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (done - task.warmup) / (task.steps - task.warmup))


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _errors_logged() -> Iterator[list[str]]:
    """Collects the first lines of the errors that the monitor logs in the block."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ulysses_monitor")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
