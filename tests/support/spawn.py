"""Runs a function in several fresh processes over gloo and returns each rank's result.

The processes are forked from a server that has already imported torch and the libraries around it
(`tests/support/fork_server.py`), so a test pays for its training and not for imports.

Any module-level function can be run: the child imports its module by name. Arguments and results
travel as `torch.load(weights_only=True)` reads them: numbers, strings, tensors, and lists, tuples
and dicts of them.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.fork_server import ENVIRONMENT, ForkServer, Task
from tests.support.ports import reserve_port

__all__ = ["SpawnError", "fork_server", "spawn"]


class SpawnError(AssertionError):
    """A rank failed, did not end in time or left processes behind; the message has its output."""


@functools.cache
def fork_server() -> ForkServer:
    """Returns the fork server of this test session."""
    return ForkServer()


def spawn(
    function: Callable[..., Any],
    world_size: int,
    *,
    args: Sequence[Any] = (),
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Runs ``function(*args)`` on every rank of a new gloo world.

    One process is started without any distributed setting, as a user's plain script is.

    Args:
        function: a module-level function.
        world_size: number of processes.
        args: its arguments.
        timeout: seconds until every child is killed.
        env: further environment variables, except those that a library reads at import.

    Returns:
        Each rank's result.

    Raises:
        SpawnError: a child failed, died or hung, or left a process running; none runs on.
    """
    folder = Path(tempfile.mkdtemp(prefix="spawn-"))
    torch.save(list(args), folder / "args.pt")
    try:
        with reserve_port() as port:
            tasks = [
                _task(function, rank, world_size, folder, port, env or {})
                for rank in range(world_size)
            ]
            ended = fork_server().run(tasks, timeout=timeout)
        if ended.timed_out:
            raise SpawnError(f"no end after {timeout:g} s\n{_logs(folder, world_size)}")
        failed = {rank: code for rank, code in enumerate(ended.codes) if code}
        if failed:
            raise SpawnError(f"exit codes by rank {failed}\n{_logs(folder, world_size)}")
        if ended.left:
            raise SpawnError(f"left running: {ended.left}\n{_logs(folder, world_size)}")
        return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(world_size)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _task(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: Path,
    port: int,
    extra: Mapping[str, str],
) -> Task:
    env = {**os.environ, **ENVIRONMENT, "TMPDIR": str(folder)}  # which goes with the folder
    if world_size > 1:
        env |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    log = str(folder / f"{rank}.log")
    return Task(
        function=f"{__name__}:run_rank",
        arguments=[function.__module__, function.__qualname__, str(folder), str(rank)],
        environment={**env, **extra},
        folder=str(Path.cwd()),
        stdout=log,
        stderr=log,
    )


def _logs(folder: Path, world_size: int) -> str:
    """The last lines that each rank printed, its traceback included."""
    texts = []
    for rank in range(world_size):
        lines = (folder / f"{rank}.log").read_text(errors="replace").splitlines()
        texts.append("\n".join([f"--- rank {rank} ---", *lines[-60:]]))
    return "\n".join(texts)


def run_rank(module: str, name: str, folder: str, rank: str) -> None:
    """The life of one child: joins the world, runs the function, leaves its result."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    function = getattr(importlib.import_module(module), name)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=world_size
        )
    args = torch.load(f"{folder}/args.pt", weights_only=True)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    if world_size > 1:
        dist.barrier()
