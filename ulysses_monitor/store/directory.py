"""The run directory: who may write it, and run.json.

A lock that the operating system holds (``flock``) marks the one writer, so a crash leaves no lock
behind. Nothing that a run recorded is overwritten unless the user asked for it by name.
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
from ulysses_monitor.common.files import write_whole
from ulysses_monitor.common.masking import mask_secrets
from ulysses_monitor.records import METRIC_SCHEMA_VERSION
from ulysses_monitor.records.json_ready import to_jsonable
from ulysses_monitor.store.control_file import CONTROL_FILE

__all__ = ["OWN_FILES", "IfExists", "RunDirectory", "check_available", "is_locked"]

IfExists = Literal["refuse", "resume", "overwrite"]

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_TRIES, _PAUSE = 5, 0.03
OWN_FILES = ("run.json", "events.jsonl", "metrics", "tensorboard", "report.html", CONTROL_FILE)
"""What belongs to a run in its directory: files and folders."""


def is_locked(path: Path) -> bool:
    """Whether a living process writes the run at `path`."""
    try:
        with (path / _LOCK).open() as lock:
            return not _lock(lock, fcntl.LOCK_SH)  # two that ask do not meet
    except FileNotFoundError:
        return False


def _lock(file: IO[str], kind: int) -> bool:
    """Locks a file if nobody else has; a file system without locks has nobody else."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        logger.warning("monitor: %s: no locks here: nothing keeps a second writer away", file.name)
    return True


def check_available(path: Path, if_exists: IfExists) -> None:
    """Checks that a run may be written at `path`, touching nothing.

    Raises:
        InputError: the directory is in use, or holds a run and `if_exists` is ``refuse``.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"run directory {path}: is a file; name a directory")
    if is_locked(path):
        raise InputError(f"run directory {path}: in use by a running training; choose another one")
    if if_exists == "refuse" and (path / "run.json").exists():
        raise InputError(
            f"run directory {path}: already holds a run; choose another one, continue it "
            '(resume_from_checkpoint, or if_exists="resume"), or replace it '
            '(overwrite_output_dir=true, or if_exists="overwrite")'
        )


class RunDirectory:
    """One run's directory, held for writing until `close`.

    Args:
        path: the directory; made if missing.
        if_exists: what to do where a run is there already.

    Raises:
        InputError: see `check_available`.
    """

    def __init__(self, path: Path, if_exists: IfExists = "refuse") -> None:
        check_available(path, if_exists)
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._process = os.getpid()
        self._lock = _take_lock(path)
        self.metrics = path / "metrics"
        self._info: dict[str, Any] = {}
        try:
            if if_exists == "overwrite":
                self._remove_old()
            self.metrics.mkdir(exist_ok=True)
            if (path / "run.json").exists():
                self._info = _read_info(path / "run.json")
        except BaseException:
            self.release()
            raise

    @property
    def info(self) -> Mapping[str, Any]:
        """What run.json says."""
        return self._info

    def start(self, info: Mapping[str, Any]) -> None:
        """Writes run.json. Values under keys that name a secret are masked."""
        starts = [*self._info.get("starts", []), time.time()]
        self._info = {
            "name": self.path.name,
            "metric_schema_version": METRIC_SCHEMA_VERSION,
            "status": "running",
            "starts": starts,
            **mask_secrets(to_jsonable(dict(info))),
        }
        self._write()

    def finish(self, status: str, *, release: bool = True) -> None:
        """Marks the run ``finished``, ``failed`` or ``stopped``, and lets go of the directory.

        Args:
            status: how it ended.
            release: whether nobody writes there any more.
        """
        if os.getpid() != self._process:
            return
        self._info |= {"status": status, "ended": time.time()}
        self._write()
        if release:
            self.release()

    def release(self) -> None:
        """Lets go of the directory and leaves run.json as it is."""
        # Closing alone keeps the lock for as long as a forked data loader worker lives.
        if os.getpid() == self._process and not self._lock.closed:
            with suppress(OSError):  # where there are no locks
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def _write(self) -> None:
        text = json.dumps(self._info, indent=2, default=str) + "\n"
        write_whole(self.path / "run.json", text.encode())

    def _remove_old(self) -> None:
        """Removes what an earlier run wrote there, and nothing else."""
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
            raise ValueError("it describes no run")
    except ValueError as error:
        raise InputError(
            f"{path}: cannot be read ({error}); repair it, or replace the run with "
            "overwrite_output_dir=true"
        ) from None
    return info


def _take_lock(path: Path) -> IO[str]:
    lock = (path / _LOCK).open("a")
    for _ in range(_TRIES):
        if _lock(lock, fcntl.LOCK_EX):
            os.set_inheritable(lock.fileno(), False)
            return lock
        time.sleep(_PAUSE)  # somebody may just look whether it is locked
    lock.close()
    raise InputError(f"run directory {path}: in use by a running training")
