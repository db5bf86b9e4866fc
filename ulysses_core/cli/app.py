"""The commands and their exit codes.

0 fine, 1 the run failed, 2 the user's input is wrong, 3 stopped by a rule or policy.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ulysses_monitor.common.errors import InputError, TrainingStoppedError

__all__ = ["main"]

app = typer.Typer(
    name="ulysses",
    help="Train LLMs on long sequences, watch them, and look at what happened.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

store = typer.Typer(help="Look after the files of runs.")
app.add_typer(store, name="store")

_RANK_0_SPEAKS_FIRST = 10.0
"""Seconds that another rank waits before it reports wrong input itself."""

Overrides = Annotated[list[str] | None, typer.Argument(help="Override any key, dotted if nested.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as examples/sft.yaml.")],
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(help="Processes on this machine; GPUs if any, else sequence_parallel_size."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Validate and print the plan; train nothing.")
    ] = False,
    adjust_lr: Annotated[
        float | None, typer.Option(help="Multiply the base learning rate by this.")
    ] = None,
    debug: Annotated[bool, typer.Option(help="Log every decision.")] = False,
) -> None:
    """Train a model from a config."""
    from ulysses_core.cli import train as command

    _configure_logging(debug)
    given = list(overrides or [])
    if adjust_lr is not None:
        given.append(f"adjust_lr={adjust_lr}")
    raise typer.Exit(command.train(config, given, nproc, dry_run=dry_run, debug=debug))


@app.command(context_settings={"allow_interspersed_args": False})
def attach(
    command: Annotated[
        list[str] | None, typer.Argument(help="What to run, as it is: -- torchrun train.py ...")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where to record; runs/<script>-<time> if not given.")
    ] = None,
    sample_every: Annotated[
        int, typer.Option(min=1, help="Read optimizer state and parameters each N steps.")
    ] = 10,
    if_exists: Annotated[
        Literal["refuse", "resume", "overwrite"],
        typer.Option(help="What to do with a run that is in the run directory already."),
    ] = "refuse",
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard files.")] = True,
) -> None:
    """Run any training command with the monitor on every Trainer it makes."""
    from ulysses_core.cli.attach import attach as run

    code = run(
        command or [],
        run_dir=run_dir,
        sample_every=sample_every,
        if_exists=if_exists,
        tensorboard=tensorboard,
    )
    raise typer.Exit(code)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A config to check against.")] = None,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(help="Processes it would run on.")] = None,
) -> None:
    """Say what this machine has, and what a config needs."""
    from ulysses_core.cli.doctor import doctor as command

    command(config, list(overrides or []), nproc)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run directory, such as runs/sft, or a URL.")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write; report.html in the run if not given.")
    ] = None,
) -> None:
    """Write report.html into a run directory and name it."""
    from ulysses_monitor.reading import open_run
    from ulysses_monitor.report import write_report

    typer.echo(write_report(open_run(run), output))


@app.command()
def runs(
    place: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of runs, a glob or a URL.")
    ] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """List the runs of a folder: state, last step, loss, alerts, when and how long."""
    from ulysses_core.cli.runs import list_runs

    list_runs(place, as_json=as_json)


@app.command()
def board(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, or a folder of runs such as runs.")
    ],
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="0 for any free one; the first from 6006 on if unset."),
    ] = None,
) -> None:
    """Open TensorBoard over some runs, on this machine only."""
    from ulysses_core.cli.board import board as command

    command(runs, port)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(help="A run directory, such as runs/sft, or a URL.")],
) -> None:
    """Follow a run in the terminal, live or finished."""
    from ulysses_core.cli.watch import watch as command

    command(run)


@app.command()
def control(
    run: Annotated[Path, typer.Argument(help="A run directory, such as runs/sft.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="policy=off|shadow|active, policy.NAME=..., lr_factor=0.5, lr_factor.GROUP=..., "
            "save, stop; several at once."
        ),
    ] = None,
    why: Annotated[str, typer.Option(help="A sentence that is recorded with it.")] = "",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the answer.")] = 60.0,
) -> None:
    """Steer a run while it trains: its policies, its learning rate, a checkpoint, an end."""
    from ulysses_core.cli.control import control as command

    raise typer.Exit(command(run, words or [], why=why, wait=wait))


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="A run directory, such as runs/sft, or a URL.")],
    policies: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset, a policy, a YAML file or module:function; may be given several times."
        ),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            help="default, a rule, a YAML file or module:function; may be given several times. "
            "default if no policy is given."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show all decisions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Say what rules and policies would have done in a run, at which steps; write nothing."""
    from ulysses_core.cli.replay import replay as command

    command(run, policies or [], rules or [], as_json=as_json, everything=everything)


@store.command()
def compact(
    run: Annotated[Path, typer.Argument(help="A run directory that nobody writes.")],
) -> None:
    """Turn a run's metrics into one Parquet file."""
    from ulysses_core.cli.store import compact as command

    command(run)


def _configure_logging(debug: bool) -> None:
    debug = debug or os.environ.get("ULYSSES_DEBUG") == "1"
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    level = logging.DEBUG if debug else logging.INFO
    for name in ("ulysses_core", "ulysses_monitor"):
        logging.getLogger(name).setLevel(level)


def main() -> None:
    """Runs the command line; wrong input becomes one line and exit code 2."""
    # The deepspeed launcher puts --local_rank before the command; LOCAL_RANK says the same.
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("--local_rank="):
        arguments = arguments[1:]
    try:
        sys.exit(app(arguments or ["--help"], standalone_mode=False) or 0)
    except typer.TyperException as error:
        message = error.format_message().splitlines()[0]
        typer.echo(f"ulysses: {message.rstrip('.')}; try ulysses --help", err=True)
        _leave(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("ulysses: interrupted", err=True)
        _leave(1)
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 says it, as a rule, and its launcher ends this one meanwhile.
            time.sleep(_RANK_0_SPEAKS_FIRST)
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
    """Exits at once: other ranks may wait in a collective that this one will not join."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)
