"""Runs a command in the foreground, with this process's terminal, signals and exit code."""

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

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_FORWARDED_SIGNALS = (*_STOP_SIGNALS, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that schedulers and users send to a training; others affect only this process."""

_EXIT_TIMEOUT = 3.0
"""Seconds that the processes of a stopped command have to exit by themselves."""
_SIGNAL_TIMEOUT = 30.0
"""Seconds that they have to exit after a signal; torchrun gives its ranks as many."""


def run_child(command: list[str], environment: Mapping[str, str]) -> int:
    """Runs `command` with this process's input and output, and forwards signals to it.

    Returns:
        Its exit code, or 128 + n if signal n ended it.

    Raises:
        InputError: the command cannot be started.
    """
    child = _Child()
    # Signals that are ignored, as under nohup, stay ignored here and in the command.
    before = {n: h for n in _FORWARDED_SIGNALS if (h := signal.getsignal(n)) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, child.forward)
        code = child.run(command, environment)
    except OSError as error:
        raise InputError(f"attach: command {command[0]}: {error.strerror or error}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    return code if code >= 0 else 128 - code


class _Child:
    """The running command, and its descendant processes at the time of a stop signal."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []
        self._stop_signal: int | None = None
        self._descendants: list[psutil.Process] = []

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        self._process = subprocess.Popen(command, env=dict(environment))  # noqa: S603 - asked for
        for number in self._pending:
            self.forward(number)
        code = self._process.wait()
        if self._stop_signal is not None:
            self._end_descendants(self._stop_signal)
        return code

    def forward(self, number: int, _: Any = None) -> None:
        """Forwards a signal to the command, or keeps it until the command has started."""
        if self._process is None:
            self._pending.append(number)
            return
        if number in _STOP_SIGNALS:
            self._stop_signal = number
            with suppress(psutil.Error):
                running = psutil.Process(self._process.pid).children(recursive=True)
                self._descendants = list({*self._descendants, *running})
        if not _is_typed(number):
            self._process.send_signal(number)

    def _end_descendants(self, number: int) -> None:
        """Ends processes that the command left running: not every launcher ends its ranks."""
        _, alive = psutil.wait_procs(self._descendants, timeout=_EXIT_TIMEOUT)
        for process in alive:
            with suppress(psutil.Error):
                process.send_signal(number)
        _, alive = psutil.wait_procs(alive, timeout=_SIGNAL_TIMEOUT)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()


def _is_typed(number: int) -> bool:
    """Returns whether the terminal sent the signal, which the command then received as well.

    Forwarding it would send it twice, and a second Ctrl-C interrupts the clean exit.
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
