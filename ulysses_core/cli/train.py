"""`ulysses train`: checks the input and starts the ranks; on a rank, trains."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import typer

from ulysses_core.cli.checks import check, rehearse
from ulysses_core.cli.launch import choose_processes, is_launched, launch
from ulysses_core.cli.logs import quiet_libraries
from ulysses_core.cli.tables import print_plan, print_summary
from ulysses_core.config import RunConfig
from ulysses_core.config.keys import explain_accepted
from ulysses_core.trainers.stage import load_config
from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.session.naming import stamp_run_dir

__all__ = ["train"]


def train(
    path: Path, overrides: list[str], nproc: int | None, *, dry_run: bool, debug: bool
) -> int:
    """Trains from a config and returns the exit code.

    If a launcher started this process, it is a rank and trains. Otherwise it checks the config,
    the data and the run directory, and starts the ranks.

    Raises:
        InputError: the user's input is wrong.
    """
    if is_launched():
        if nproc is not None:
            raise InputError(
                f"--nproc is {nproc}, but a launcher (torchrun, deepspeed) has already started the "
                "processes; remove --nproc"
            )
        config = load_config(path, overrides)
        check(config, int(os.environ["WORLD_SIZE"]))
        return _train_rank(config)
    config = load_config(path, overrides)
    processes = choose_processes(nproc, config.settings.sequence_parallel_size)
    check(config, processes)
    if dry_run:
        quiet_libraries()
        print_plan(config, processes, rehearse(config, processes))
        return 0
    for key, meaning in explain_accepted(config).items():
        logging.getLogger(__name__).info("%s: %s", key, meaning)
    arguments = ["train", str(path), *overrides, *(["--debug"] if debug else [])]
    if config.settings.output_dir is None:
        arguments.append(f"output_dir={stamp_run_dir(config.name, time.time())}")
    return launch(arguments, processes)


def _train_rank(config: RunConfig) -> int:
    from ulysses_core.trainers import UlyssesTrainingManager
    from ulysses_monitor.sinks import ConsoleSink

    quiet_libraries()
    signal.signal(signal.SIGTERM, _raise_exit)
    is_first = os.environ["RANK"] == "0"
    manager = UlyssesTrainingManager(config, sinks=[ConsoleSink()] if is_first else [])
    try:
        with manager:
            manager.run_training()
    except InputError:
        raise
    except TrainingStoppedError as error:  # on every rank alike
        if is_first and manager.run_dir is not None:
            _show_result(manager.run_dir, config)
            typer.echo(f"ulysses: stopped: {error}", err=True)
        _end_together()
        return 3
    except Exception:  # noqa: BLE001 - printed in full before the process exits
        traceback.print_exc()
        return _leave(manager.run_dir, is_first)
    if is_first and manager.run_dir is not None:
        _show_result(manager.run_dir, config)
    _end_process_group()
    return 0


def _show_result(run_dir: Path, config: RunConfig) -> None:
    """Writes the report and prints a summary; a report that fails does not fail the training."""
    if not config.settings.monitor.enabled:
        typer.echo(f"model saved in {run_dir}")
        return
    from ulysses_monitor.reading import open_run

    run, report = open_run(run_dir), None
    try:
        from ulysses_monitor.report import write_report

        report = write_report(run)
    except InputError as error:
        logging.getLogger(__name__).error("%s", error)
    except Exception:
        logging.getLogger(__name__).exception("could not write the report")
    print_summary(run, report)


def _leave(run_dir: Path | None, is_first: bool) -> int:
    if is_first and run_dir is not None:
        typer.echo(f"ulysses: the run failed; its records are in {run_dir}", err=True)
    sys.stderr.flush()
    # Without cleanup, because other ranks may wait in a collective with this one.
    os._exit(1)


def _end_together() -> None:
    """Waits for all ranks, because the launcher ends all of them when one exits with an error."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
    _end_process_group()


def _end_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _raise_exit(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)
