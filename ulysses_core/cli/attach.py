"""`ulysses attach`: runs any training command with the monitor on every Trainer it creates.

The command runs unchanged. Its environment makes every Python process in it wait for the import of
``transformers.trainer``; see `ulysses_monitor.integrations.auto`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import typer

from ulysses_core.cli.attach_outcomes import describe_outcomes
from ulysses_core.cli.child import run_child
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.launch import launched_rank
from ulysses_monitor.integrations.auto import AttachSettings, check_first_place, read_notes
from ulysses_monitor.session.naming import name_run_dir
from ulysses_monitor.session.settings import MonitorSettings, WhenTaken

__all__ = ["attach"]


def attach(
    command: list[str],
    *,
    run_dir: Path | None,
    sample_every: int,
    if_exists: WhenTaken,
    tensorboard: bool,
) -> int:
    """Runs a command with the monitor attached, and returns its exit code.

    Raises:
        InputError: the command cannot be started, or the run directory cannot be used.
    """
    check_command(command)
    is_first = launched_rank() == 0
    place = run_dir or default_run_dir(command)
    if is_first:  # on other ranks rank 0 may already be using the directory
        first = check_first_place(place, if_exists)
        taken = "" if first == place else f"{place} is taken, so "
        typer.echo(f"ulysses: attached; {taken}Trainers are recorded to {first}", err=True)
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
        outcomes = read_notes(notes)
    if is_first:
        for line in describe_outcomes(outcomes, code):
            typer.echo(f"ulysses: {line}", err=True)
    return code


def check_command(command: list[str]) -> None:
    """Checks that a command can be started.

    Raises:
        InputError: there is no command, or it is not an executable program.
    """
    if not command:
        raise InputError(
            "attach: no command; add it after --, as in ulysses attach -- python train.py"
        )
    name, path = command[0], Path(command[0])
    if shutil.which(name) is not None:
        return
    if os.sep not in name and not path.exists():
        raise InputError(f"attach: command {name} is not on PATH; give its path")
    if not path.exists():
        raise InputError(f"attach: command {name}: no such file")
    if path.is_dir():
        raise InputError(f"attach: command {name} is a folder; expected a program")
    advice = f"python {name}" if path.suffix == ".py" else f"chmod +x {name}, or its interpreter"
    raise InputError(f"attach: command {name} is not executable; try {advice}")


def default_run_dir(command: list[str]) -> Path:
    """Returns ``runs/<script>-<time>`` that does not exist; also for a module or a program."""
    scripts = [Path(part).stem for part in command if part.endswith(".py")]
    modules = [after for part, after in itertools.pairwise(command) if part == "-m"]
    name = scripts[0] if scripts else Path(modules[-1] if modules else command[0]).name
    return name_run_dir(name)
