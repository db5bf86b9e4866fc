"""Which run directory each training of one monitor gets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from ulysses_monitor.common.ranks import broadcast_bytes, rank
from ulysses_monitor.session.opening import Place
from ulysses_monitor.store import IfExists, holds_run, is_locked

__all__ = ["choose_fresh_place", "choose_place", "numbered_dirs"]


def choose_place(
    first: Path,
    if_exists: IfExists,
    *,
    previous: Path | None,
    resumes: bool,
    device: torch.device,
) -> Place:
    """Chooses where a training records; every rank calls it and gets rank 0's answer.

    The first training gets `first`. A later one continues the previous run if it resumes from a
    checkpoint, or if the user asked for that; otherwise it gets the first free of ``first-2``,
    ``first-3``, ..., so that it never touches another run.

    Args:
        first: the run directory that the user named.
        if_exists: what the user wants where a run is there already.
        previous: the run directory of the training before; None for the first.
        resumes: whether the training resumes from a checkpoint.
        device: where the collective backend's tensors live.
    """
    if previous is None:
        return Place(first, if_exists)
    if resumes or if_exists == "resume":
        return Place(previous, "resume")
    chosen = first
    if rank() == 0:
        later = itertools.islice(numbered_dirs(first), 1, None)
        chosen = next(path for path in later if _is_free(path))
    name = broadcast_bytes(str(chosen).encode(), device).decode()
    return Place(Path(name), "refuse")


def choose_fresh_place(first: Path, *, resumes: bool) -> Place:
    """Chooses where a training records of which nobody named the run, so that none is refused.

    It gets the first free of ``first``, ``first-2``, ...; if it resumes from a checkpoint, it
    continues the last run of these.
    """
    taken = list(itertools.takewhile(lambda path: not _is_free(path), numbered_dirs(first)))
    runs = [path for path in taken if holds_run(path) and not is_locked(path)]
    if resumes and runs:
        return Place(runs[-1], "resume")
    free = next(itertools.islice(numbered_dirs(first), len(taken), None))
    return Place(free, "refuse")


def numbered_dirs(first: Path) -> Iterator[Path]:
    """Yields ``first``, ``first-2``, ``first-3``, ..."""
    yield first
    for number in itertools.count(2):
        yield first.with_name(f"{first.name}-{number}")


def _is_free(path: Path) -> bool:
    if not path.exists():
        return True
    return path.is_dir() and not is_locked(path) and not holds_run(path)
