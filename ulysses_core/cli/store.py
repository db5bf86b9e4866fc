"""`ulysses store`: looks after the files of a run."""

from __future__ import annotations

from pathlib import Path

import typer

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.store import RunDirectory
from ulysses_monitor.store import compact as compact_files

__all__ = ["compact"]


def compact(run: Path) -> None:
    """Turns a run's metrics into one Parquet file; damaged parts are named and left alone.

    Raises:
        InputError: there is no run, somebody writes it, or there is no room.
    """
    if not (run / "run.json").is_file():
        raise InputError(f"run {run}: no run.json there; name a run directory such as runs/sft")
    directory = RunDirectory(run, "resume")  # so that nobody else writes it meanwhile
    try:
        before = _files(directory.metrics)
        damaged = compact_files(directory.metrics)
        after = _files(directory.metrics)
    except OSError as error:
        raise InputError(f"run {run}: not compacted: {error.strerror or error}") from None
    finally:
        directory.release()
    typer.echo(f"{run}: {_described(before)} -> {_described(after)}")
    for name, reason in damaged.items():
        typer.echo(f"damaged, left as it is: metrics/{name}: {reason}", err=True)


def _files(metrics: Path) -> list[int]:
    return [p.stat().st_size for p in metrics.iterdir() if not p.name.startswith(".")]


def _described(sizes: list[int]) -> str:
    return f"{len(sizes)} file{'s' * (len(sizes) != 1)}, {sum(sizes) / 1e6:,.1f} MB"
