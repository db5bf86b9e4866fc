"""Running a command in the foreground: its terminal, its signals and its exit code are ours."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from ulysses_monitor.common.errors import InputError

__all__ = ["run_child"]

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PASSED_ON = (*_STOPS, signal.SIGUSR1, signal.SIGUSR2)
"""Those that schedulers and users send to a training; others act on this process alone."""

_OWN_END = 3.0
"""Seconds that the processes of a stopped command have to end by themselves."""
_ASKED_END = 30.0
"""Seconds more, once they were asked; as many as torchrun gives its ranks."""


def run_child(command: list[str], environment: Mapping[str, str]) -> int:
    """Runs `command` with this process's input and output, passing on signals.

    Returns:
        Its exit code; 128 + n where signal n ended it.

    Raises:
        InputError: it cannot be started.
    """
    child = _Child()
    # An ignored signal stays ignored, here and in the command: that is what nohup does.
    before = {n: h for n in _PASSED_ON if (h := signal.getsignal(n)) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, child.pass_on)
        code = child.run(command, environment)
    except OSError as error:
        raise InputError(f"attach: command {command[0]}: {error.strerror or error}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    return code if code >= 0 else 128 - code


class _Child:
    """The command while it runs, and the processes it had when it was told to stop."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._stop: int | None = None
        self._family: list[psutil.Process] = []

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        self._process = subprocess.Popen(command, env=dict(environment))  # noqa: S603 - asked for
        for number in self._early:
            self.pass_on(number)
        code = self._process.wait()
        if self._stop is not None:
            self._end_family(self._stop)
        return code

    def pass_on(self, number: int, _: Any = None) -> None:
        """Handles a signal, also one that comes before the command is there."""
        if self._process is None:
            self._early.append(number)
            return
        if number in _STOPS:
            self._stop = number
            with suppress(psutil.Error):
                found = psutil.Process(self._process.pid).children(recursive=True)
                self._family = list({*self._family, *found})
        if not _is_typed(number):
            self._process.send_signal(number)

    def _end_family(self, number: int) -> None:
        """Ends what the command left running: not every launcher ends its ranks."""
        _, alive = psutil.wait_procs(self._family, timeout=_OWN_END)
        for process in alive:
            with suppress(psutil.Error):
                process.send_signal(number)
        _, alive = psutil.wait_procs(alive, timeout=_ASKED_END)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()


def _is_typed(number: int) -> bool:
    """Whether the signal comes from the keyboard, which sends it to the command as well.

    Twice would be once too often: a second Ctrl-C breaks off what the first one set going.
    """
    if number not in (signal.SIGINT, signal.SIGQUIT):
        return False
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
