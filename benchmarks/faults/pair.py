"""Two processes over gloo, started once, that train whatever they are asked to together."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.faults.training import Recorded

__all__ = ["RANKS", "Pair", "the_pair"]

RANKS = 2
PATIENCE = 120.0
"""Seconds that a training may take."""


class Pair:
    """Two ranks; they end with this process, or with `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pair-")
        store = str(Path(self._folder.name) / "store")
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(RANKS)]
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, train: Callable[..., Recorded], *args: Any) -> Recorded:
        """Calls ``train(*args)``, a function of a module, on both ranks.

        Returns:
            What rank 0 recorded.

        Raises:
            RuntimeError: a rank raised.
            TimeoutError: a rank did not answer; both are ended.
        """
        for pipe in self._pipes:
            pipe.send((train, args))
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"{train.__name__}{args} took more than {PATIENCE:g} s")
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        recorded: Recorded = answers[0]
        return recorded

    def close(self) -> None:
        """Ends both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        the_pair.cache_clear()


@functools.cache
def the_pair() -> Pair:
    """Returns the two ranks of this process."""
    pair = Pair()
    atexit.register(pair.close)
    return pair


def _serve(rank: int, store: str, pipe: Connection) -> None:
    """Trains as it is told until the other end is closed."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            train, args = pipe.recv()
        except EOFError:
            return
        try:
            recorded = train(*args)
            pipe.send(recorded if rank == 0 else Recorded([]))
        except Exception:  # noqa: BLE001 - the other end raises it
            pipe.send(traceback.format_exc())
