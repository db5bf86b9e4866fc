"""The run directory: its lock, its run.json, and what happens to an earlier run.

The operating system holds the lock of the one writer (``flock``), so a crash leaves no lock
behind. Nothing that a run recorded is overwritten unless the user asks for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.files import replace_file
from ulysses_monitor.common.masking import mask_secrets
from ulysses_monitor.records import METRIC_SCHEMA_VERSION
from ulysses_monitor.records.json_ready import to_jsonable
from ulysses_monitor.store.control_file import CONTROL_FILE
from ulysses_monitor.store.rows_file import ROWS_FOLDER

__all__ = [
    "OWN_FILES",
    "IfExists",
    "RunDirectory",
    "check_available",
    "check_writable",
    "holds_run",
    "is_locked",
]

IfExists = Literal["refuse", "resume", "overwrite"]

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_TRIES, _PAUSE = 5, 0.03
OWN_FILES = (
    *("run.json", "events.jsonl", "metrics", "tensorboard", "report.html"),
    *(ROWS_FOLDER, CONTROL_FILE),
)
"""The files and folders in the directory that belong to the run."""


def is_locked(path: Path) -> bool:
    """Returns whether a running process writes the run at `path`."""
    try:
        with (path / _LOCK).open() as lock:
            return not _try_lock(lock, fcntl.LOCK_SH)  # shared: two processes may ask at once
    except FileNotFoundError:
        return False


def _try_lock(file: IO[str], kind: int) -> bool:
    """Locks a file if nobody else has; on a file system without locks, nobody ever has."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        logger.warning(
            "monitor: %s: this file system has no locks; do not start a second training here",
            file.name,
        )
    return True


def holds_run(path: Path) -> bool:
    """Whether a run was recorded at `path`."""
    return (path / "run.json").exists()


_WAYS = (
    'resume it (resume_from_checkpoint, or if_exists="resume"), or replace it '
    '(overwrite_output_dir=true, or if_exists="overwrite")'
)


def check_available(
    path: Path, if_exists: IfExists, *, where: str = "run directory", ways: str = _WAYS
) -> None:
    """Checks that a run can be written at `path`, without changing anything.

    Args:
        path: the run directory; it need not exist.
        if_exists: what should happen to a run that is there.
        where: what the user calls the directory, for the message.
        ways: how the user can keep a directory that holds a run, for the message.

    Raises:
        InputError: the directory is in use, cannot be written, or holds a run and `if_exists` is
            ``refuse``.
    """
    check_writable(path, where=where)
    if is_locked(path):
        raise InputError(f"{where}: {path} is in use by a running training; choose another one")
    if if_exists == "refuse" and holds_run(path):
        raise InputError(f"{where}: {path} already holds a run; choose another one, {ways}")


def check_writable(path: Path, *, where: str = "run directory") -> None:
    """Checks that a directory can be made or written at `path`, without changing anything.

    Raises:
        InputError: it cannot.
    """
    found = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not found.is_dir():
        raise InputError(f"{where}: {found} is a file; expected a directory")
    if not os.access(found, os.W_OK | os.X_OK):
        raise InputError(f"{where}: {found} cannot be written; choose another one")


class RunDirectory:
    """The directory of one run, locked for writing until `finish` or `release`.

    Args:
        path: the directory; created if it does not exist.
        if_exists: what to do if it already holds a run.

    Raises:
        InputError: see `check_available`.
    """

    def __init__(self, path: Path, if_exists: IfExists = "refuse") -> None:
        check_available(path, if_exists)
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._process = os.getpid()
        self._lock = _acquire_lock(path)
        self.metrics = path / "metrics"
        self._info: dict[str, Any] = {}
        try:
            if if_exists == "overwrite":
                self._remove_old()
            self.metrics.mkdir(exist_ok=True)
            if holds_run(path):
                self._info = _read_info(path / "run.json")
        except BaseException:
            self.release()
            raise

    @property
    def info(self) -> Mapping[str, Any]:
        """The content of run.json."""
        return self._info

    def start(self, info: Mapping[str, Any]) -> None:
        """Writes run.json, with secrets masked."""
        starts = [*self._info.get("starts", []), time.time()]
        self._info = {
            "name": self.path.name,
            "metric_schema_version": METRIC_SCHEMA_VERSION,
            "status": "running",
            "starts": starts,
            **mask_secrets(to_jsonable(dict(info))),
        }
        self._write()

    def describe(self, info: Mapping[str, Any]) -> None:
        """Adds entries to run.json while the run is written, with secrets masked."""
        if os.getpid() == self._process:
            self._info |= mask_secrets(to_jsonable(dict(info)))
            self._write()

    def finish(
        self, status: str, about: Mapping[str, Any] | None = None, *, release: bool = True
    ) -> None:
        """Marks the run ``finished``, ``failed`` or ``stopped``, and releases the directory.

        Args:
            status: how the run ended.
            about: further entries for run.json about the end, written with secrets masked.
            release: False if something may still write there, so that the lock must stay.
        """
        if os.getpid() != self._process:
            return
        ending = mask_secrets(to_jsonable(dict(about or {})))
        self._info |= {**ending, "status": status, "ended": time.time()}
        self._write()
        if release:
            self.release()

    def release(self) -> None:
        """Releases the directory and leaves run.json unchanged."""
        # Closing is not enough: a forked data loader worker would keep the lock alive.
        if os.getpid() == self._process and not self._lock.closed:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def _write(self) -> None:
        text = json.dumps(self._info, indent=2, default=str) + "\n"
        with replace_file(self.path / "run.json") as file:
            file.write(text.encode())

    def _remove_old(self) -> None:
        """Removes only what an earlier run wrote."""
        for name in OWN_FILES:
            old = self.path / name
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info, dict) or not isinstance(info.get("starts", []), list):
            raise ValueError("it does not describe a run")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"run directory: {path} cannot be read ({error}); repair it, or replace the run "
            '(overwrite_output_dir=true, or if_exists="overwrite")'
        ) from None
    return info


def _acquire_lock(path: Path) -> IO[str]:
    lock = (path / _LOCK).open("a")
    for _ in range(_TRIES):
        if _try_lock(lock, fcntl.LOCK_EX):
            os.set_inheritable(lock.fileno(), False)
            return lock
        time.sleep(_PAUSE)  # another process may be asking whether it is locked
    lock.close()
    raise InputError(f"run directory: {path} is in use by a running training; choose another one")
