"""The helper that parallel tests stand on: it must neither hang nor leave a process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import SpawnError, spawn


def add_ranks(offset: int) -> dict[str, Any]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "total": total, "world": dist.get_world_size()}


def raise_on_rank_1(folder: str) -> None:
    leave_pid(folder)
    if dist.get_rank() == 1:
        raise ValueError("rank one is out of order")
    dist.barrier()


def hang(folder: str) -> None:
    leave_pid(folder)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder, f"{grandchild.pid}.pid").touch()
    time.sleep(600)


def leave_pid(folder: str) -> None:
    Path(folder, f"{os.getpid()}.pid").touch()


def is_distributed() -> bool:
    return dist.is_initialized() or "RANK" in os.environ


def assert_all_gone(folder: Path, least: int) -> None:
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    assert len(pids) >= least
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)  # an orphan is buried by the system's init, in its own time
    assert not [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_each_rank_gives_back_its_result() -> None:
    results = spawn(add_ranks, 3, args=[10], timeout=60)
    assert [r["rank"] for r in results] == [0, 1, 2]
    assert all(r["total"].item() == 33 and r["world"] == 3 for r in results)


def test_one_process_is_not_distributed() -> None:
    assert spawn(is_distributed, 1, timeout=60) == [False]


def test_a_raising_rank_ends_the_others_and_its_traceback_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpawnError, match="ValueError: rank one is out of order"):
        spawn(raise_on_rank_1, 2, args=[str(tmp_path)], timeout=3600)
    assert_all_gone(tmp_path, least=2)


def sleep_long(folder: str) -> None:
    leave_pid(folder)
    time.sleep(600)


PARENT = """
import sys
from tests.support.spawn import spawn
from tests.support.test_spawn import sleep_long
spawn(sleep_long, 2, args=[sys.argv[1]])
"""


def test_children_end_where_their_parent_was_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=root)
    deadline = time.monotonic() + 150
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert_all_gone(tmp_path, least=2)


def test_a_hanging_function_is_killed_with_what_it_started(tmp_path: Path) -> None:
    with pytest.raises(SpawnError, match="no end after 10 s"):
        spawn(hang, 2, args=[str(tmp_path)], timeout=10)
    assert_all_gone(tmp_path, least=3)
