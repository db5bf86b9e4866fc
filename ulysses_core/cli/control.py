"""`ulysses control`: steers a run while it trains, and waits for its answer."""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ulysses_core.cli.tables import plain
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.command import Command, parse_words
from ulysses_monitor.store import is_locked
from ulysses_monitor.store.control_file import send_command

__all__ = ["control"]

_PAUSE = 0.2


def control(run: Path, words: Sequence[str], *, why: str, wait: float) -> int:
    """Sends a command to a run and prints what became of it.

    Args:
        run: the run directory.
        words: what it should do, such as ``policy=shadow``.
        why: a sentence that is recorded with it.
        wait: seconds after which nobody waits any more; the command stays.

    Returns:
        The exit code.

    Raises:
        InputError: a word is wrong, nobody writes the run, or the run did not do it.
    """
    command = Command(who=_user(), why=why, **parse_words(words))
    _check(run)
    events = run / "events.jsonl"
    start = events.stat().st_size if events.exists() else 0
    send_command(run, command)
    answer = _wait(run, events, start, command.id, time.monotonic() + wait)
    if answer is None:
        typer.echo(f"{run}: sent; it has not reached its next step yet, and does it then", err=True)
        return 0
    step, refused = answer.get("step"), answer.get("refused")
    if isinstance(refused, str):
        raise InputError(plain(f"step {step}: refused: {refused}").plain)
    typer.echo(plain(f"step {step}: done: {answer.get('result')}").plain)
    return 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return str(os.geteuid())


def _check(run: Path) -> None:
    info = run / "run.json"
    if not info.is_file():
        raise InputError(f"run {run}: no run.json there; name a run directory such as runs/sft")
    if not is_locked(run):
        raise InputError(f"run {run}: is not running; only a run that trains can be steered")
    if (owner := info.stat().st_uid) != os.geteuid():
        raise InputError(f"run {run}: belongs to user {owner}, who alone may steer it")


def _wait(
    run: Path, events: Path, start: int, command_id: str, deadline: float
) -> dict[str, Any] | None:
    """The run's answer to a command; None if it is not there in time."""
    while True:
        lives = is_locked(run)  # before the look: nothing comes after its end
        lines, start = _lines(events, start)
        for line in lines:
            event = _event(line)
            if (event.get("kind"), event.get("id")) == ("control", command_id):
                return event
        if not lives:
            raise InputError(f"run {run}: ended before it did this")
        if not time.monotonic() < deadline:
            return None
        time.sleep(_PAUSE)


def _lines(path: Path, start: int) -> tuple[list[bytes], int]:
    """The whole lines of a file from `start` on, and where the next one begins."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read()
    except FileNotFoundError:
        return [], start
    whole = text[: text.rfind(b"\n") + 1]
    return whole.splitlines(), start + len(whole)


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
