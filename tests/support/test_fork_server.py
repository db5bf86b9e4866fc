"""Forked processes are as good as new ones, and nothing of one reaches the next."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.commands import run_python
from tests.support.ports import free_port, reserve_port
from tests.support.spawn import SpawnError, spawn


def disorder() -> list[object]:
    """Leaves everything changed that tests could depend on; returns how it was found."""
    found = [
        os.environ.get("DISORDER"),
        str(torch.get_default_dtype()),
        torch.initial_seed(),
        threading.active_count(),
        dist.is_initialized(),
        "disorder" in sys.modules,
    ]
    os.environ["DISORDER"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sys.modules["disorder"] = sys
    return found


def test_what_one_process_changes_the_next_does_not_see() -> None:
    first, second = (spawn(disorder, 1, timeout=60)[0] for _ in range(2))
    assert first == second
    assert first[0] is None
    assert first[3:] == [1, False, False]


def leave_a_process() -> int:
    """In a session of its own, so that its parent's end does not reach it."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    return subprocess.Popen(sleeper, start_new_session=True).pid


def leave_a_pid(folder: str) -> None:
    Path(folder, "pid").write_text(str(leave_a_process()))


def test_a_process_that_is_left_behind_is_killed_and_told(tmp_path: Path) -> None:
    with pytest.raises(SpawnError, match=r"left running: .*sleep\(600\)"):
        spawn(leave_a_pid, 1, args=[str(tmp_path)], timeout=60)
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_a_program_ends_as_an_interpreter_does(tmp_path: Path) -> None:
    program = (
        "import atexit, os, sys, threading\n"
        "atexit.register(print, 'at the end')\n"
        "threading.Timer(0.1, print, ['from a thread']).start()\n"
        "print(__name__, sys.argv, os.getcwd(), os.environ['MINE'])\n"
        "sys.exit(3)\n"
    )
    done = run_python("-c", program, "--x", folder=tmp_path, environment={"MINE": "1"})
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        f"__main__ ['-c', '--x'] {tmp_path} 1",
        "from a thread",
        "at the end",
    ]
    assert done.stderr == ""
    raised = run_python("-c", "raise KeyError('mine')", folder=tmp_path)
    assert (raised.returncode, raised.stderr.splitlines()[-1]) == (1, "KeyError: 'mine'")


def test_a_module_is_found_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys; print(__name__, sys.argv[1:])")
    assert run_python("-m", "mine", "a", folder=tmp_path).stdout == "__main__ ['a']\n"


def test_a_program_that_does_not_end_is_killed(tmp_path: Path) -> None:
    endless = "import time; print('begun', flush=True); time.sleep(600)"
    with pytest.raises(AssertionError, match=r"no end after 3 s\nbegun"):
        run_python("-c", endless, folder=tmp_path, timeout=3)
    assert run_python("-c", "print(1)", folder=tmp_path).stdout == "1\n"


def test_a_reserved_port_goes_to_nobody_but_who_asks_for_it() -> None:
    with reserve_port() as port, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", free_port()), timeout=5)
