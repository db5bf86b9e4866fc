"""`ulysses attach`: any training command, with the monitor on every Trainer it makes.

The command is started as it is, in an environment in which each Python process below waits for
``transformers.trainer`` to be imported; see `ulysses_monitor.integrations.auto`.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from pathlib import Path

import typer

from ulysses_core.cli.child import run_child
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.integrations.auto import AttachSettings, Note, check_first_place, read_notes
from ulysses_monitor.session.settings import MonitorSettings
from ulysses_monitor.store import IfExists

__all__ = ["attach"]

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Where launchers that may start `ulysses attach` itself say which rank they start."""


def attach(
    command: list[str],
    *,
    run_dir: Path | None,
    sample_every: int,
    if_exists: IfExists,
    tensorboard: bool,
) -> int:
    """Runs a command with the monitor attached, and returns its exit code.

    Raises:
        InputError: the command cannot be started, or the run directory cannot be taken.
    """
    check_command(command)
    is_first = next((os.environ[key] for key in _RANKS if key in os.environ), "0") == "0"
    place = run_dir or default_run_dir(command)
    if is_first:  # the others may come later, when the first one has taken it
        check_first_place(place, if_exists)
        typer.echo(f"ulysses: attached; what a Trainer does is recorded in {place}", err=True)
    with tempfile.TemporaryDirectory(prefix="ulysses-attach-") as folder:
        notes = Path(folder, "notes")
        notes.touch()
        settings = AttachSettings(
            run_dir=place.absolute(),
            command_id=uuid.uuid4().hex,
            notes=notes,
            monitor=MonitorSettings(
                sample_every=sample_every, if_exists=if_exists, tensorboard=tensorboard
            ),
        )
        code = run_child(command, settings.environment(os.environ))
        told = read_notes(notes)
    if is_first:
        for line in summary(told, code):
            typer.echo(f"ulysses: {line}", err=True)
    return code


def check_command(command: list[str]) -> None:
    """Refuses what is not a command that can be started.

    Raises:
        InputError: see the message.
    """
    if not command:
        raise InputError("attach: no command; write it after --: ulysses attach -- python train.py")
    name, path = command[0], Path(command[0])
    if shutil.which(name) is not None:
        return
    if os.sep not in name and not path.exists():
        raise InputError(f"attach: command {name} is not on PATH")
    if not path.exists():
        raise InputError(f"attach: command {name}: no such file")
    if path.is_dir():
        raise InputError(f"attach: command {name}: is a folder; name a program")
    advice = f"python {name}" if path.suffix == ".py" else f"chmod +x {name}, or its interpreter"
    raise InputError(f"attach: command {name}: is not executable; try {advice}")


def default_run_dir(command: list[str]) -> Path:
    """``runs/<script>-<time>``, or with the module's or the program's name; one that is free."""
    scripts = [Path(part).stem for part in command if part.endswith(".py")]
    modules = [after for part, after in itertools.pairwise(command) if part == "-m"]
    name = scripts[0] if scripts else Path(modules[-1] if modules else command[0]).name
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", name).strip("-.") or "run"
    now = time.time()
    while True:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        place = Path("runs", f"{name}-{stamp}")
        if not place.exists():
            return place
        now += 1


def summary(notes: list[Note], code: int) -> list[str]:
    """What became of the Trainers of a command that ended with `code`, a line each."""
    lines = [_line(note) for note in notes if note.outcome in ("recorded", "failed", "own")]
    outcomes = {note.outcome for note in notes}
    if lines:
        return lines
    if "elsewhere" in outcomes:
        return ["recorded by rank 0, on another node"]
    if "made" in outcomes:
        return ["nothing recorded: a Trainer was made, but its train() did not begin"]
    if code:
        return [f"nothing recorded: no Trainer was made before the command ended with code {code}"]
    return [
        "nothing recorded: the command made no transformers or TRL Trainer; "
        "a plain loop is watched by two lines in it: with monitor.watch(model, optimizer): ..."
    ]


def _line(note: Note) -> str:
    if note.outcome == "recorded":
        run = Path(note.text)
        shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
        return f"recorded {shown}; see it: ulysses report {shlex.quote(str(shown))}"
    if note.outcome == "own":
        return "a Trainer with a monitor of its own was left alone"
    return f"not recorded: {note.text}"
