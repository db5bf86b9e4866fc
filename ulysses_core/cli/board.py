"""`ulysses board`: serves TensorBoard for some runs, to this machine only."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ulysses_core.cli.tables import as_text, check_description, print_damage
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading import open_run

__all__ = ["board", "find_runs"]


def board(paths: Sequence[Path], port: int | None) -> None:
    """Serves TensorBoard until Ctrl-C.

    Args:
        paths: run directories, or directories of runs.
        port: the port; 0 for any free port, None for the first free port from 6006.

    Raises:
        InputError: there is no run at a path, or the port is in use.
    """
    runs = find_runs(paths)
    for run in runs.values():
        _name_damage(run)
    signal.signal(signal.SIGTERM, _raise_exit)
    with tempfile.TemporaryDirectory(prefix="ulysses-board-") as folder:
        for name, run in runs.items():
            link = Path(folder, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((run / "tensorboard").resolve(), target_is_directory=True)
        try:
            url = _launch(folder, port)
            count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
            typer.echo(f"TensorBoard of {count}: {url}#custom_scalars (press Ctrl-C to stop)")
            sys.stdout.flush()
            threading.Event().wait()
        except KeyboardInterrupt:
            typer.echo("")


def _name_damage(run: Path) -> None:
    """Says what of a run is damaged; its TensorBoard files are served all the same."""
    if not os.path.lexists(run / "run.json"):  # TensorBoard files of another tool
        return
    try:
        reader = open_run(run)
        check_description(reader)
        reader.names()
    except InputError as error:
        typer.echo(as_text(str(error)).plain, err=True)
    else:
        print_damage(reader)


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns the runs with TensorBoard files at `paths`, by unique names.

    Raises:
        InputError: a path has no such run.
    """
    found: list[Path] = []
    for path in paths:
        runs = [path] if _has_events(path) else _find_runs_inside(path)
        if not runs:
            raise InputError(f"run {path}: {_explain_missing(path)}")
        found += [run for run in runs if run not in found]
    return dict(zip(_name_uniquely(found), found, strict=True))


def _find_runs_inside(path: Path) -> list[Path]:
    return sorted(run for run in path.iterdir() if _has_events(run)) if path.is_dir() else []


def _has_events(run: Path) -> bool:
    return (run / "tensorboard").is_dir()


def _explain_missing(path: Path) -> str:
    expected = "expected a run directory such as runs/sft, or a folder of runs"
    if not path.exists():
        return f"no such folder; {expected}"
    if (path / "run.json").is_file():
        return (
            "no TensorBoard files; the run was recorded with tensorboard=false, or where "
            "TensorBoard is not installed"
        )
    return f"no run in this folder; {expected}"


def _name_uniquely(runs: Sequence[Path]) -> list[str]:
    """Returns the folders' names, with as many parent folders as it takes to be unique."""
    parts = [run.resolve().parts[1:] for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(i) for i in range(len(runs))]


def _launch(folder: str, port: int | None) -> str:
    """Starts TensorBoard on a thread of this process and returns its URL."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from tensorboard import default, program
    from tensorboard.util import tb_logging

    tb_logging.get_logger().setLevel(logging.ERROR)
    server = program.TensorBoard(default.get_plugins())
    arguments = ["tensorboard", "--logdir", folder, "--host", "127.0.0.1"]
    arguments += ["--samples_per_plugin", "images=100,text=200"]
    if port is not None:
        arguments += ["--port", str(port)]
    server.configure(arguments)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # TensorBoard advertises its data loader
            url: str = server.launch()
    except program.TensorBoardServerException as error:
        raise InputError(f"port {port or 6006}: {error.msg.splitlines()[0]}") from error
    return url


def _raise_exit(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)
