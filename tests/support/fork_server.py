"""A process that has imported the heavy libraries once and forks a fresh process for every task.

Importing torch, transformers, TRL and DeepSpeed takes seconds; a fork takes 30 ms. A task's process
comes from a parent that has imported and done nothing else: no threads, no tensors, no process
group. So a task starts as clean as a new interpreter, and nothing has to be cleaned up between
tasks, which is why there is no pool of reused workers here. Three things differ from a new
interpreter: modules are already imported, variables that a library reads at import come from
the server's environment, and all tasks share one hash seed. Where that matters, start a process.

The server runs one job at a time: some processes, a time limit, and what to do at the end. Whatever
is still running then, at any depth and in whatever session, is killed and reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

__all__ = ["ENVIRONMENT", "Ended", "ForkServer", "Task"]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONPATH": str(ROOT),
}
"""What libraries read when they are imported; a task's environment cannot change it any more."""

_PRELOADED = (
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "pytest",
    "pandas",
    "pyarrow.parquet",
    "datasets",
    "numba",
    "peft",
    "deepspeed.runtime.zero.muon.original_muon",  # which imports the compiler
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "trl",
    "matplotlib.pyplot",
    "torch.distributed.optim",
    "ulysses_monitor.monitor",
    "ulysses_monitor.report",
    "ulysses_core.trainers",
    "ulysses_core.cli",
)
_GRACE_SECONDS = 1.0
_SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)
_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process runs, as ``python -m NAME``, ``python -c CODE`` or a call would."""

    function: str = ""
    """``module:function``, called with `arguments`; the process ends without exit handlers."""
    module: str = ""
    """A module to run as ``python -m`` does, with `arguments` as its command line."""
    code: str = ""
    """A program to run as ``python -c`` does."""
    arguments: Sequence[str] = ()
    environment: Mapping[str, str]
    folder: str
    """The working directory."""
    stdout: str
    """The file that takes standard output."""
    stderr: str
    """The file that takes standard error; may be the same one."""


@dataclass
class Ended:
    """How a job ended."""

    codes: list[int | None]
    """Exit code by process, negative for a signal; None if it had to be killed."""
    timed_out: bool = False
    left: list[str] = field(default_factory=list)
    """The command lines of processes that outlived the ones that had started them."""


class ForkServer:
    """The side of the caller. Starts the server on first use; it ends with its caller."""

    def __init__(self, environment: Mapping[str, str] = ENVIRONMENT) -> None:
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def run(self, tasks: Sequence[Task], *, timeout: float, together: bool = True) -> Ended:
        """Runs each task in a new process, all at once, and waits for their end.

        Args:
            tasks: what to run.
            timeout: seconds until all are killed.
            together: kill the others soon after one has failed.
        """
        connection = self._connect()
        job = {"tasks": [asdict(t) for t in tasks], "timeout": timeout, "together": together}
        try:
            _send(connection, job)
            answer = _receive(connection)
        except BaseException:  # an interrupt or a test's time limit: nothing may run on
            self.close()
            raise
        if not answer:
            self.close()
            raise RuntimeError("the fork server died")
        return Ended(**answer)

    def close(self) -> None:
        """Ends the server, and whatever it runs."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _connect(self) -> socket.socket:
        if self._connection is None:
            self._connection, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    cwd=ROOT,
                    env={**os.environ, **self._environment},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for the caller
                )
        return self._connection


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Returns the next message, which is empty once the other side is gone."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            return {}
        line += part
    return dict(json.loads(line))


# -- the server -------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> Callable[[], None] | None:
    """Runs jobs until the caller is gone; in a forked process, returns what it is to run."""
    while job := _receive(connection):
        pids: list[int] = []
        for task in job["tasks"]:
            pid = _fork()
            if pid == 0:
                connection.close()
                return functools.partial(_run, Task(**task))
            pids.append(pid)
        ended = _watch(pids, connection, time.monotonic() + job["timeout"], job["together"])
        _send(connection, asdict(ended))
    return None


def _fork() -> int:
    with warnings.catch_warnings():  # jemalloc's thread is prepared for forks
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _watch(pids: list[int], connection: socket.socket, deadline: float, together: bool) -> Ended:
    codes: dict[int, int] = {}
    handles = {os.pidfd_open(pid): pid for pid in pids}
    poll = select.poll()
    for handle in [*handles, connection.fileno()]:
        poll.register(handle, select.POLLIN)
    timed_out = failed = False
    while handles:
        ready = poll.poll(max(0, 1000 * (deadline - time.monotonic())))
        if not ready:
            timed_out = not failed
            break
        for handle, _ in ready:
            if handle == connection.fileno():  # the caller is gone
                _kill_descendants()
                os._exit(0)
            poll.unregister(handle)
            pid = handles.pop(handle)
            os.close(handle)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if codes[pid] and together and not failed:
                failed = True  # the others may be about to say why, too
                deadline = min(deadline, time.monotonic() + 0.5)
    for handle in handles:
        os.close(handle)
    fine = not handles and not any(codes.values())
    left = _kill_descendants(_GRACE_SECONDS if fine else 0)
    return Ended([codes.get(pid) for pid in pids], timed_out, left if fine else [])


def _kill_descendants(grace: float = 0) -> list[str]:
    """Kills everything below this process, orphans included, and returns their command lines."""
    until = time.monotonic() + grace
    while _descendants() and time.monotonic() < until:
        time.sleep(0.02)
    found: list[str] = []
    while below := _descendants():
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(" ".join(process.cmdline()) or process.name())
                process.kill()
        time.sleep(0.01)
    return list(dict.fromkeys(found))


def _descendants() -> list[psutil.Process]:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return psutil.Process().children(recursive=True)


# -- a forked process -------------------------------------------------------------------------


def _run(task: Task) -> None:
    os.setsid()
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(task.environment)
    tempfile.tempdir = None
    os.chdir(task.folder)
    for number, path in ((1, task.stdout), (2, task.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if task.function:
        _call(task)
    elif task.module:
        sys.argv[1:] = task.arguments
        sys.path[0] = task.folder
        runpy.run_module(task.module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *task.arguments]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(task.code, "<string>", "exec"), vars(main))  # noqa: S102 - as python -c does


def _call(task: Task) -> None:
    code = 1
    try:
        module, _, name = task.function.partition(":")
        getattr(__import__(module, fromlist=["_"]), name)(*task.arguments)
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the caller must read it
        traceback.print_exc()
    # Libraries leave threads and exit hooks that can hang or complain; the result is on disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _preload() -> None:
    for name in _PRELOADED:
        __import__(name)
    # Compiling it takes half a minute, and only tensor-parallel inference uses it.
    sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
    threads = {p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")}
    started = threads - {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}
    if started or len(list(Path("/proc/self/task").iterdir())) > 2:
        raise RuntimeError(f"importing started threads, so forking is not safe: {threads}")
    gc.collect()
    gc.freeze()  # the memory stays shared


def _main() -> Any:
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    _preload()
    return _serve(connection)


if __name__ == "__main__":
    _task = _main()
    if _task is not None:
        _task()
