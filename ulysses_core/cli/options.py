"""Arguments and options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ulysses_monitor.common.environment import package_versions

__all__ = ["AsJson", "Config", "Debug", "LocalRun", "Overrides", "Processes", "Run", "Version"]

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as examples/sft.yaml.")
]
Debug = Annotated[bool, typer.Option(help="Log every decision.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override keys of the config, such as learning_rate=1e-4 or monitor.sample_every=5.",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        help="Processes to start. Default: one per GPU, or sequence_parallel_size without GPUs."
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory, such as runs/sft, or a URL.")
]
LocalRun = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/sft.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"ulysses {package_versions().get('ulysses-toolkit', 'not installed')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
]
