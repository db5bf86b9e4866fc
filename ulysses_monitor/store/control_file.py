"""Steers a run while it trains, through a file in its directory that only its owner can write.

`send_command` appends a command as one line; the training process polls the file at each step
(`ControlFile`). The file is trusted only as far as its owner and permissions allow, and every line
is checked.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.command import Command, check

__all__ = ["CONTROL_FILE", "ControlFile", "send_command"]

CONTROL_FILE = "control.jsonl"

logger = logging.getLogger(__name__)

_LARGEST_LINE, _LARGEST_FILE = 64 << 10, 1 << 20
_MOST_PROBLEMS = 100


def send_command(run_dir: Path, command: Command) -> None:
    """Appends a command to the control file of a run.

    Raises:
        InputError: others could write the file, or it is full.
        OSError: the disk is full.
    """
    path, line = run_dir / CONTROL_FILE, command.to_json().encode() + b"\n"
    rule = f"expected at most {_LARGEST_LINE} bytes"
    check(len(line) <= _LARGEST_LINE, "the command's size", len(line), rule)
    with _open_safely(str(path), os.O_RDWR | os.O_APPEND | os.O_CREAT) as (file, found):
        size = found.st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line  # an earlier line was cut off
        if size + len(line) > _LARGEST_FILE:
            raise InputError(_refusal(str(path), "is full"))
        if os.write(file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class ControlFile:
    """Receives the commands for a run, in the one process that obeys them. No call raises.

    Commands that were sent to an earlier start of the run are removed.

    Args:
        run_dir: the run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = str(run_dir / CONTROL_FILE)
        self._stamp: tuple[int, int, int] | None = None
        self._waiting: deque[Command] = deque()
        self._lines: set[bytes] = set()
        self._ids: set[str] = set()
        self._problems: list[str] = []
        self._reported: set[str] = set()
        self._skipped = (
            0,
            0,
        )  # inode and size of what an earlier start left, if it cannot be removed
        try:
            (run_dir / CONTROL_FILE).unlink()
        except OSError:
            with suppress(OSError):
                found = os.lstat(self._path)
                self._skipped = found.st_ino, found.st_size

    def poll(self) -> Command | None:
        """Returns the next command, each command once; costs one `lstat` if nothing is new."""
        try:
            found = os.lstat(self._path)
            stamp = found.st_ino, found.st_size, found.st_ctime_ns
            if stamp != self._stamp:
                self._stamp = stamp
                self._read()
        except FileNotFoundError:
            self._stamp, self._skipped = None, (0, 0)
        except InputError as error:
            self._report(str(error))
        except OSError as error:
            self._stamp = None  # the error may pass
            self._report(f"{self._path}: cannot be read ({error.strerror})")
        return self._waiting.popleft() if self._waiting else None

    def problems(self) -> list[str]:
        """Returns why commands were ignored: each reason once, and at most 100 in all."""
        problems, self._problems = self._problems, []
        return problems

    def _read(self) -> None:
        """Reads the whole file, which is small and may have been replaced or truncated."""
        with _open_safely(self._path, os.O_RDONLY) as (file, found):
            text = os.read(file, _LARGEST_FILE)
        if found.st_ino != self._skipped[0] or found.st_size < self._skipped[1]:
            self._skipped = 0, 0
        start = self._skipped[1]
        *lines, _ = text[start:].split(b"\n")  # the last one is empty or still being written
        for number, line in enumerate(lines, 1 + text.count(b"\n", 0, start)):
            if line.strip() and line not in self._lines:
                self._lines.add(line)
                self._parse_line(number, line)

    def _parse_line(self, number: int, line: bytes) -> None:
        try:
            rule = f"expected at most {_LARGEST_LINE} bytes"
            check(len(line) <= _LARGEST_LINE, "its size", len(line), rule)
            command = Command.from_json(line.decode())
        except (InputError, ValueError, RecursionError) as error:
            self._report(f"{self._path}, line {number}: {error}")
            return
        if command.id not in self._ids:
            self._ids.add(command.id)
            self._waiting.append(command)

    def _report(self, problem: str) -> None:
        if problem not in self._reported and len(self._reported) < _MOST_PROBLEMS:
            self._reported.add(problem)
            self._problems.append(problem)
            logger.warning("monitor: ignored a command: %s", problem)


@contextmanager
def _open_safely(path: str, flags: int) -> Iterator[tuple[int, os.stat_result]]:
    """Opens the control file if nobody but this user can have written it.

    Raises:
        InputError: somebody else can, or it is not a regular file.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
            raise
        raise InputError(_refusal(path, f"cannot be opened ({error.strerror})")) from None
    try:
        found = os.fstat(file)
        if fault := _fault(found):
            raise InputError(_refusal(path, fault))
        yield file, found
    finally:
        os.close(file)


def _refusal(path: str, fault: str) -> str:
    return f"{path} {fault}; expected a file of your own, up to 1 MiB, with mode 600: remove it"


def _fault(found: os.stat_result) -> str:
    """Returns why a file cannot be trusted, or an empty string."""
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):o})"
    if found.st_nlink > 1:
        return "has a second name (a hard link)"
    return f"has {found.st_size} bytes" if found.st_size > _LARGEST_FILE else ""
