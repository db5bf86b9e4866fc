"""Runs a command of `ulysses`, and ends with its exit code.

0 success, 1 the run failed, 2 the user's input is wrong, 3 a rule or policy stopped the run.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import typer

from ulysses_core.cli.app import app
from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.common.extras import explain_missing

__all__ = ["main"]

_CommandError: Any = typer.BadParameter.__mro__[2]
"""`typer.TyperException`; an older typer, such as axolotl's 0.25.1, has click's exceptions."""

_REPORT_DELAY = 10.0
"""Seconds that other ranks wait before they report wrong input, because rank 0 reports it too."""


def main() -> None:
    """Runs the command line and exits; wrong input prints one line and exits with code 2."""
    # The deepspeed launcher adds --local_rank before the command; LOCAL_RANK has the same value.
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("--local_rank="):
        arguments = arguments[1:]
    try:
        with explain_missing(next(iter(arguments), "ulysses")):
            _leave(app(arguments or ["--help"], standalone_mode=False) or 0)
    except _CommandError as error:
        message = error.format_message().splitlines()[0]
        typer.echo(f"ulysses: {message.rstrip('.')}; try ulysses --help", err=True)
        _leave(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("ulysses: interrupted", err=True)
        _leave(1)
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 usually reports the same error, and its launcher then ends this rank.
            time.sleep(_REPORT_DELAY)
        typer.echo(f"ulysses: {error}", err=True)
        _leave(2)
    except OSError as error:
        if os.environ.get("ULYSSES_DEBUG") == "1":
            raise
        typer.echo(f"ulysses: {error}", err=True)
        _leave(1)
    except TrainingStoppedError as error:
        typer.echo(f"ulysses: stopped: {error}", err=True)
        _leave(3)


def _leave(code: int) -> None:
    """Exits; a rank does so without cleanup.

    Other ranks may wait in a collective with it. And a thread of gloo that still drops the tensors
    of the last collective aborts the process once the interpreter has begun to finalize.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
