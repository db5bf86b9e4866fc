"""Steers a run while it trains, through a file in its directory that only its owner may touch.

One side appends a command as a line (`send`), the other looks at each step (`ControlFile`). The
file is no more trusted than its owner and permissions allow, and every line is checked.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import stat
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import time as now
from typing import Any, get_args

from ulysses_monitor.errors import InputError, nearest
from ulysses_monitor.records import Mode

__all__ = ["CONTROL_FILE", "MAX_LR_FACTOR", "Command", "ControlFile", "parse_words", "send"]

CONTROL_FILE = "control.jsonl"
MAX_LR_FACTOR = 10.0

logger = logging.getLogger(__name__)

_ALL = "*"
_WORDS = "policy=off|shadow|active, policy.NAME=..., lr_factor=0.5, lr_factor.GROUP=..., save, stop"
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
_GROUP = re.compile(r"\*|0|[1-9][0-9]{0,5}")
_LONGEST_TEXT = 500
_LATEST = 1e11
"""Seconds since 1970, in the year 5138."""
_LARGEST_LINE, _LARGEST_FILE = 64 << 10, 1 << 20
_MOST_PROBLEMS = 100


@dataclass(frozen=True, kw_only=True)
class Command:
    """What somebody asks of a run: any of these at once.

    Attributes:
        id: tells it from others.
        who: the user.
        why: a sentence for people.
        time: when it was given, in seconds since 1970.
        modes: of policies by name; under ``*`` of all.
        lr_factors: on the scheduled learning rate, from 0 to `MAX_LR_FACTOR`, by number of the
            parameter group; under ``*`` of all.
        save: whether to write a checkpoint.
        stop: whether to end the training in good order.

    Raises:
        InputError: one of them is of another type or out of bounds.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    who: str
    why: str = ""
    time: float = field(default_factory=now)
    modes: Mapping[str, Mode] = field(default_factory=dict)
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    save: bool = False
    stop: bool = False

    def __post_init__(self) -> None:
        good = isinstance(self.id, str) and _ID.fullmatch(self.id)
        _check(good, "id", self.id, "up to 64 letters and digits")
        _check_text("who", self.who)
        _check_text("why", self.why, least=0)
        _check(_is_number(self.time, _LATEST), "time", self.time, "seconds since 1970")
        _check_modes(self.modes)
        _check_factors(self.lr_factors)
        for name in ("save", "stop"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, value, "true or false")

    def to_json(self) -> str:
        """The command as one line."""
        return json.dumps(
            {**vars(self), "modes": {**self.modes}, "lr_factors": {**self.lr_factors}}
        )

    @classmethod
    def from_json(cls, text: str) -> Command:
        """The command that `to_json` wrote.

        Raises:
            InputError: it is none.
        """
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"no JSON ({error}); allowed is one object a line") from None
        _check(isinstance(given, dict), "the command", given, "an object")
        known = [each.name for each in fields(cls)]
        if unknown := [name[:_LONGEST_TEXT] for name in given if name not in known]:
            hint = nearest(unknown[0], known)
            _check(False, "a key", unknown[0], f"one of {', '.join(known)}{hint}")
        if missing := [name for name in ("id", "who", "time") if name not in given]:
            raise InputError(f"{missing[0]} is missing; needed are id, who and time")
        return cls(**given)

    def described(self) -> str:
        """The command in plain words."""
        parts = [f"{_of_policy(name)} to {mode}" for name, mode in self.modes.items()]
        for group, factor in self.lr_factors.items():
            of = "" if group == _ALL else f" of group {group}"
            parts.append(f"learning rate{of} x {factor:g}")
        parts += [name for name in ("save", "stop") if getattr(self, name)]
        return "; ".join(parts) or "nothing"


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """The fields of a `Command` that words such as ``policy=shadow`` and ``save`` stand for.

    Raises:
        InputError: a word is not known or is said twice, or there is none.
    """
    said: dict[tuple[str, str], Any] = {}
    for word in words:
        kind, name, value = _parse(word)
        if (kind, name) in said:
            raise InputError(f"{word!r}: the same is said before; say it once")
        said[kind, name] = value
    if not said:
        raise InputError(f"nothing is said that the run should do; allowed is {_WORDS}")
    modes = {name: mode for (kind, name), mode in said.items() if kind == "policy"}
    factors = {name: factor for (kind, name), factor in said.items() if kind == "lr_factor"}
    _check_modes(modes)
    _check_factors(factors)
    once = {name: (name, _ALL) in said for name in ("save", "stop")}
    return {"modes": modes, "lr_factors": factors, **once}


def _parse(word: str) -> tuple[str, str, Any]:
    key, equals, value = word.partition("=")
    kind, dot, name = key.partition(".")
    if word in ("save", "stop"):
        return word, _ALL, True
    if kind not in ("policy", "lr_factor") or not equals:
        hint = nearest(kind, ("policy", "lr_factor", "save", "stop"))
        raise InputError(f"{word!r} is not known{hint}; allowed is {_WORDS}")
    name = name if dot else _ALL
    if kind == "lr_factor":
        with suppress(ValueError):  # what is no number is refused with the other values
            return kind, name, float(value)
    return kind, name, value


def send(run_dir: Path, command: Command) -> None:
    """Appends a command to the control file of a run.

    Raises:
        InputError: the file could be written by others, or has no room.
    """
    path, line = run_dir / CONTROL_FILE, command.to_json().encode() + b"\n"
    _check(len(line) <= _LARGEST_LINE, "the command's size", len(line), f"{_LARGEST_LINE} bytes")
    with _opened(str(path), os.O_RDWR | os.O_APPEND | os.O_CREAT) as (file, found):
        size = found.st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line  # an earlier one was cut off
        if size + len(line) > _LARGEST_FILE:
            raise InputError(_refusal(str(path), "is full"))
        if os.write(file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class ControlFile:
    """What is sent to a run, for the one process that obeys. No call raises.

    What was sent to an earlier start of the run is gone.

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
        self._said: set[str] = set()
        self._left = 0, 0  # inode and size of an earlier start's file that cannot be removed
        try:
            (run_dir / CONTROL_FILE).unlink()
        except OSError:
            with suppress(OSError):
                found = os.lstat(self._path)
                self._left = found.st_ino, found.st_size

    def poll(self) -> Command | None:
        """The next command, each once; costs one `lstat` where nothing is new."""
        try:
            found = os.lstat(self._path)
            stamp = found.st_ino, found.st_size, found.st_ctime_ns
            if stamp != self._stamp:
                self._stamp = stamp
                self._read()
        except FileNotFoundError:
            self._stamp, self._left = None, (0, 0)
        except InputError as error:
            self._say(str(error))
        except OSError as error:
            self._stamp = None  # it may pass
            self._say(f"{self._path}: cannot be read ({error.strerror})")
        return self._waiting.popleft() if self._waiting else None

    def problems(self) -> list[str]:
        """Why something there was not obeyed: each once, and no more than 100 in all."""
        problems, self._problems = self._problems, []
        return problems

    def _read(self) -> None:
        """Reads all of the file: it is small, and so it may have been replaced or cut."""
        with _opened(self._path, os.O_RDONLY) as (file, found):
            text = os.read(file, _LARGEST_FILE)
        if found.st_ino != self._left[0] or found.st_size < self._left[1]:
            self._left = 0, 0
        start = self._left[1]
        *lines, _ = text[start:].split(b"\n")  # the last is empty, or still being written
        for number, line in enumerate(lines, 1 + text.count(b"\n", 0, start)):
            if line.strip() and line not in self._lines:
                self._lines.add(line)
                self._take(number, line)

    def _take(self, number: int, line: bytes) -> None:
        try:
            _check(len(line) <= _LARGEST_LINE, "its size", len(line), f"{_LARGEST_LINE} bytes")
            command = Command.from_json(line.decode())
        except (InputError, ValueError, RecursionError) as error:
            self._say(f"{self._path}, line {number}: {error}")
            return
        if command.id not in self._ids:
            self._ids.add(command.id)
            self._waiting.append(command)

    def _say(self, problem: str) -> None:
        if problem not in self._said and len(self._said) < _MOST_PROBLEMS:
            self._said.add(problem)
            self._problems.append(problem)
            logger.warning("monitor: not obeyed: %s", problem)


@contextmanager
def _opened(path: str, flags: int) -> Iterator[tuple[int, os.stat_result]]:
    """The control file, if nobody but this user can have written it.

    Raises:
        InputError: somebody can.
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
    return f"{path}: {fault}; allowed is a file of up to 1 MiB of your own, of mode 600: remove it"


def _fault(found: os.stat_result) -> str:
    """Why a file is not to be trusted; empty if it is."""
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):o})"
    if found.st_nlink > 1:
        return "has a second name (a hard link)"
    return f"has {found.st_size} bytes" if found.st_size > _LARGEST_FILE else ""


def _check(good: object, what: str, value: object, allowed: str) -> None:
    if not good:
        raise InputError(f"{what} is {value!r:.100}; allowed is {allowed}")


def _check_text(what: str, text: object, least: int = 1) -> None:
    good = isinstance(text, str) and least <= len(text) <= _LONGEST_TEXT and text.isprintable()
    _check(good, what, text, f"a text of {least} to {_LONGEST_TEXT} printable characters")


def _check_modes(modes: Mapping[str, Mode]) -> None:
    _check(isinstance(modes, Mapping), "modes", modes, "a mode by policy")
    for name, mode in modes.items():
        _check_text("a policy's name", name)
        allowed = get_args(Mode)
        _check(mode in allowed, f"the mode of {_of_policy(name)}", mode, ", ".join(allowed))


def _of_policy(name: str) -> str:
    return "policies" if name == _ALL else f"policy {name}"


def _check_factors(factors: Mapping[str, float]) -> None:
    _check(isinstance(factors, Mapping), "lr_factors", factors, "a number by group")
    for group, factor in factors.items():
        good = isinstance(group, str) and _GROUP.fullmatch(group)
        _check(good, "a group of lr_factor", group, "its number, such as 0")
        what = "lr_factor" if group == _ALL else f"lr_factor.{group}"
        _check(_is_number(factor, MAX_LR_FACTOR), what, factor, f"0 to {MAX_LR_FACTOR:g}")


def _is_number(value: object, most: float) -> bool:
    """Whether it is a number from 0; NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
