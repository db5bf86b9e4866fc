"""Runs ``python -m ...`` and ``python -c ...`` in forked processes that need not import again.

What these are not for: signals, standard input, terminals, and what importing itself does.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.fork_server import Task
from tests.support.spawn import fork_server

__all__ = ["run_python"]


def run_python(
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Runs a Python command line in a process of its own, to its end.

    Args:
        arguments: what follows ``python``: ``-m``, a module and its arguments; or ``-c``, a program
            and its arguments.
        folder: the working directory.
        environment: variables to add.
        timeout: seconds until it is killed.

    Raises:
        AssertionError: it did not end in time, or left processes running; all are killed.
    """
    flag, what, *rest = arguments
    with tempfile.TemporaryDirectory(prefix="command-") as said:
        out, err = Path(said, "out"), Path(said, "err")
        task = Task(
            module=what if flag == "-m" else "",
            code=what if flag == "-c" else "",
            arguments=rest,
            environment={**os.environ, **(environment or {})},
            folder=str(folder),
            stdout=str(out),
            stderr=str(err),
        )
        ended = fork_server().run([task], timeout=timeout)
        done = subprocess.CompletedProcess(
            arguments, ended.codes[0] or 0, out.read_text(), err.read_text()
        )
    output = f"\n{done.stdout}\n{done.stderr}"
    assert not ended.timed_out, f"no end after {timeout:g} s{output}"
    assert not ended.left, f"left running: {ended.left}{output}"
    return done
