"""Runs a function in several fresh processes over gloo and hands back what each of them returned.

A module-level function of any module can be run: the child imports that module by its name. What
travels, both ways, is what `torch.load(weights_only=True)` reads: numbers, strings, tensors, and
lists, tuples and dicts of them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["SpawnError", "spawn"]

_ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.05


class SpawnError(AssertionError):
    """A child failed or did not end in time; the message carries the children's own words."""


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
        env: further environment variables.

    Returns:
        Each rank's result.

    Raises:
        SpawnError: a child failed, died or hung; no child is left running.
    """
    folder = Path(tempfile.mkdtemp(prefix="spawn-"))
    torch.save(list(args), folder / "args.pt")
    children: list[subprocess.Popen[bytes]] = []
    try:
        port = str(_free_port())
        children.extend(
            _start(function, rank, world_size, folder, port, env or {})
            for rank in range(world_size)
        )
        _wait(children, folder, time.monotonic() + timeout, timeout)
        return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(world_size)]
    finally:
        for child in children:
            _kill(child)
        shutil.rmtree(folder, ignore_errors=True)


def _start(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: Path,
    port: str,
    extra: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    env = dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "TMPDIR": str(folder),  # goes with the folder
        "PYTHONPATH": str(_ROOT),
    }
    if world_size > 1:
        env |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }
    place = [function.__module__, function.__qualname__]
    command = [sys.executable, "-m", __spec__.name, *place, str(folder), str(rank)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=env | dict(extra),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # one kill reaches whatever the child itself started
        )


def _wait(
    children: list[subprocess.Popen[bytes]], folder: Path, deadline: float, timeout: float
) -> None:
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            time.sleep(0.5)  # the others may be about to say why, too
            break
        if time.monotonic() > deadline:
            raise SpawnError(f"no end after {timeout:g} s\n{_logs(folder, len(children))}")
        time.sleep(_POLL_SECONDS)
    failed = {rank: child.poll() for rank, child in enumerate(children) if child.poll()}
    if failed:
        raise SpawnError(f"exit codes by rank {failed}\n{_logs(folder, len(children))}")


def _logs(folder: Path, world_size: int) -> str:
    """What each rank printed, its traceback included, the last lines of it."""
    texts = []
    for rank in range(world_size):
        lines = (folder / f"{rank}.log").read_text(errors="replace").splitlines()
        texts.append("\n".join([f"--- rank {rank} ---", *lines[-60:]]))
    return "\n".join(texts)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kills the child's whole session, also what an ended child left behind in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _end_with(parent: int) -> None:
    """Ends this child where the parent was killed and can no longer do it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _child(module: str, name: str, folder: Path, rank: int) -> None:
    """The life of one child: joins the world, runs the function, leaves its result."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    function = getattr(importlib.import_module(module), name)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
    args = torch.load(folder / "args.pt", weights_only=True)
    torch.save(function(*args), folder / f"{rank}.pt")
    if world_size > 1:
        dist.barrier()


if __name__ == "__main__":
    code = 1
    try:
        _child(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the parent must read it
        traceback.print_exc()
    # Libraries leave threads and exit hooks that can hang or complain; the result is on disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
