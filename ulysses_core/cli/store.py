"""`ulysses store`: maintains the files of a run."""

from __future__ import annotations

from pathlib import Path

import typer

from ulysses_core.cli.tables import check_description, print_damage
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading import open_run
from ulysses_monitor.store import RunDirectory
from ulysses_monitor.store import compact as compact_files

__all__ = ["compact"]


def compact(run: Path) -> None:
    """Merges a run's metrics into one Parquet file; names damaged files and keeps them.

    Raises:
        InputError: there is no run, it is being written, or the disk is full.
    """
    if not (run / "run.json").is_file():
        raise InputError(
            f"run {run}: no run.json in this folder; expected a run directory such as runs/sft"
        )
    reader = open_run(run)
    check_description(reader)
    if not (run / "metrics").is_dir():
        raise InputError(f"run {run}: metrics is missing or not a folder; expected a folder")
    print_damage(reader)
    directory = RunDirectory(run, "resume")  # locks it against other writers
    try:
        before = _list_sizes(directory.metrics)
        damaged = compact_files(directory.metrics)
        after = _list_sizes(directory.metrics)
    except OSError as error:
        raise InputError(f"run {run}: cannot compact it: {error.strerror or error}") from None
    finally:
        directory.release()
    typer.echo(f"{run}: {_describe(before)} -> {_describe(after)}")
    for name, reason in damaged.items():
        typer.echo(f"skipped damaged file metrics/{name}: {reason}", err=True)


def _list_sizes(metrics: Path) -> list[int]:
    return [p.lstat().st_size for p in metrics.iterdir() if not p.name.startswith(".")]


def _describe(sizes: list[int]) -> str:
    return f"{len(sizes)} file{'s' * (len(sizes) != 1)}, {sum(sizes) / 1e6:,.1f} MB"
