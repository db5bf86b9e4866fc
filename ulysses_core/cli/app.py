"""The commands of `ulysses`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ulysses_core.cli.export import export
from ulysses_core.cli.logs import configure_logging
from ulysses_core.cli.options import (
    AsJson,
    Config,
    Debug,
    LocalRun,
    Overrides,
    Processes,
    Run,
    Version,
)

__all__ = ["app"]

app = typer.Typer(name="ulysses", add_completion=False, pretty_exceptions_enable=False)

store = typer.Typer(help="Maintain the files of runs.")
app.add_typer(store, name="store")
app.command()(export)


@app.callback()
def _read_options(version: Version = False) -> None:
    """Train LLMs on long sequences, and record, follow and steer any training."""


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Processes = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check the config and print the plan without training.")
    ] = False,
    adjust_lr: Annotated[
        float | None, typer.Option(help="Multiply the base learning rate by this factor.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a model from a config."""
    from ulysses_core.cli import train as command

    configure_logging(debug)
    changes = list(overrides or [])
    if adjust_lr is not None:
        changes.append(f"adjust_lr={adjust_lr}")
    raise typer.Exit(command.train(config, changes, nproc, dry_run=dry_run, debug=debug))


@app.command()
def generate(
    config: Config,
    overrides: Overrides = None,
    nproc: Processes = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer prompts with a model, and keep answers by their reward."""
    from ulysses_core.cli.generate import generate_answers

    configure_logging(debug)
    code = generate_answers(config, overrides or [], nproc, as_json=as_json, debug=debug)
    raise typer.Exit(code)


@app.command(context_settings={"allow_interspersed_args": False})
def attach(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            help="The training command after --, as in ulysses attach -- torchrun train.py.",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run directory to record to. Default: runs/<script>-<time>."),
    ] = None,
    sample_every: Annotated[
        int, typer.Option(min=1, help="Read optimizer state and parameters every N steps.")
    ] = 10,
    if_exists: Annotated[
        Literal["new", "refuse", "resume", "overwrite"],
        typer.Option(
            help="What to do if the run directory already contains a run; "
            "new records to RUN-2, RUN-3, ..."
        ),
    ] = "new",
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard files.")] = True,
) -> None:
    """Run any training command and record every Trainer that it creates."""
    from ulysses_core.cli.attach import attach as run

    code = run(
        command or [],
        run_dir=run_dir,
        sample_every=sample_every,
        if_exists=if_exists,
        tensorboard=tensorboard,
    )
    raise typer.Exit(code)


@app.command("check-data")
def check_data(
    config: Config,
    overrides: Overrides = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also write a picture to this file: .png, .svg or .pdf."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the data of a config: tokens, labels, duplicates, template, secrets."""
    from ulysses_core.cli.check_data import check_data as command

    raise typer.Exit(command(config, overrides or [], as_json=as_json, plot=plot))


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="A YAML file, such as examples/sft.yaml."),
    ] = None,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            help="Processes to plan for. Default: one per GPU, or sequence_parallel_size."
        ),
    ] = None,
) -> None:
    """Show what this machine has and what a config needs."""
    from ulysses_core.cli.doctor import doctor as command

    command(config, list(overrides or []), nproc)


@app.command()
def report(
    run: Run,
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: report.html in the run directory.")
    ] = None,
) -> None:
    """Write a run's report.html and print its path."""
    from ulysses_core.cli.tables import print_damage
    from ulysses_monitor.reading import open_run
    from ulysses_monitor.report import write_report

    reader = open_run(run)
    reader.logs_damage = False
    typer.echo(write_report(reader, output))
    print_damage(reader)


@app.command()
def runs(
    place: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of runs, a glob or a URL.")
    ] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs of a folder with state, step, loss, alerts, start and duration."""
    from ulysses_core.cli.runs import list_runs

    list_runs(place, as_json=as_json)


@app.command()
def board(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run directories, or folders of runs, such as runs."),
    ],
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port to serve on; 0 for any free port. Default: the first free port from 6006.",
        ),
    ] = None,
) -> None:
    """Serve TensorBoard for some runs, to this machine only."""
    from ulysses_core.cli.board import board as command

    command(runs, port)


@app.command()
def watch(run: Run) -> None:
    """Follow a run in the terminal; a finished run is shown once."""
    from ulysses_core.cli.watch import watch as command

    command(run)


@app.command()
def control(
    run: LocalRun,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHANGE",
            help="One or more of policy=off|shadow|active, policy.NAME=..., lr_factor=0.5, "
            "lr_factor.GROUP=..., save, stop.",
        ),
    ] = None,
    why: Annotated[str, typer.Option(help="A reason, which the run records.")] = "",
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the run's answer.")
    ] = 60.0,
) -> None:
    """Steer a run while it trains: policies, learning rate, checkpoints, stop."""
    from ulysses_core.cli.control import control as command

    raise typer.Exit(command(run, words or [], why=why, wait=wait))


@app.command()
def replay(
    run: Run,
    policies: Annotated[
        list[str] | None,
        typer.Option(help="A preset, a policy, a YAML file or module:function. Can be repeated."),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            help="default, a rule, a YAML file or module:function. Can be repeated. "
            "Default: the default rules, if there are no policies."
        ),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show all decisions and alerts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what rules and policies would have done in a run, and at which steps."""
    from ulysses_core.cli.replay import replay as command

    command(run, policies or [], rules or [], as_json=as_json, show_all=show_all)


@app.command()
def rows(
    run: Run,
    step: Annotated[int, typer.Option(min=1, help="The optimizer step.")],
    config: Annotated[
        Path | None,
        typer.Option(help="The config that was trained: shows the text of its rows."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A file or folder with the rows of the dataset in their order: shows them."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which rows a step trained on, on every rank, the most suspicious first."""
    from ulysses_core.cli.rows import show_rows

    show_rows(run, step, config=config, data=data, as_json=as_json)


@app.command()
def diagnose(
    run: Run,
    html: Annotated[
        Path | None, typer.Option(help="Also write the diagnosis as a page to this file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also write a picture of the evidence to this file: .png, .svg or .pdf."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what happened in a run, the probable cause first, and what could not be checked."""
    from ulysses_core.cli.diagnose import diagnose_run

    diagnose_run(run, as_json=as_json, html=html, plot=plot)


@store.command()
def compact(run: LocalRun) -> None:
    """Merge the metrics of a run that has ended into one Parquet file."""
    from ulysses_core.cli.store import compact as command

    command(run)
