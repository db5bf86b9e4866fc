"""`ulysses control`: steers a run while it trains and waits for its answer."""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ulysses_core.cli.tables import as_text
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records.command import Command, parse_words
from ulysses_monitor.store import is_locked
from ulysses_monitor.store.control_file import send_command

__all__ = ["control"]

_PAUSE = 0.2


def control(run: Path, words: Sequence[str], *, why: str, wait: float) -> int:
    """Sends a command to a run and prints the run's answer.

    Args:
        run: the run directory.
        words: the changes, such as ``policy=shadow``.
        why: a reason, which the run records.
        wait: seconds to wait for the answer; after that the command still applies.

    Returns:
        The exit code.

    Raises:
        InputError: a change is wrong, the run is not training, or the run refused the command.
    """
    command = Command(who=_user_name(), why=why, **parse_words(words))
    _check_run(run)
    events = run / "events.jsonl"
    start = events.stat().st_size if events.exists() else 0
    send_command(run, command)
    answer = _wait_for_answer(run, events, start, command.id, time.monotonic() + wait)
    if answer is None:
        typer.echo(f"{run}: sent; no answer yet, the run applies it at its next step", err=True)
        return 0
    step, refused = answer.get("step"), answer.get("refused")
    if isinstance(refused, str):
        raise InputError(as_text(f"step {step}: refused: {refused}").plain)
    typer.echo(as_text(f"step {step}: done: {answer.get('result')}").plain)
    return 0


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return str(os.geteuid())


def _check_run(run: Path) -> None:
    info = run / "run.json"
    if not info.is_file():
        raise InputError(
            f"run {run}: no run.json in this folder; expected a run directory such as runs/sft"
        )
    if not is_locked(run):
        raise InputError(f"run {run}: it is not running; expected a run that is training")
    if (owner := info.stat().st_uid) != os.geteuid():
        raise InputError(f"run {run}: it belongs to user {owner}; only its owner can steer it")


def _wait_for_answer(
    run: Path, events: Path, start: int, command_id: str, deadline: float
) -> dict[str, Any] | None:
    """Returns the run's answer to a command; None if there is none before the deadline."""
    while True:
        is_running = is_locked(run)  # checked first, because an ended run writes no more events
        lines, start = _read_lines(events, start)
        for line in lines:
            event = _parse_event(line)
            if (event.get("kind"), event.get("id")) == ("control", command_id):
                return event
        if not is_running:
            raise InputError(f"run {run}: it ended before it applied the command")
        if not time.monotonic() < deadline:
            return None
        time.sleep(_PAUSE)


def _read_lines(path: Path, start: int) -> tuple[list[bytes], int]:
    """Returns the complete lines of a file from byte `start`, and where the next one begins."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read()
    except OSError:  # it does not exist yet, or is damaged
        return [], start
    complete = text[: text.rfind(b"\n") + 1]
    return complete.splitlines(), start + len(complete)


def _parse_event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}
