"""Starts one process per rank with torch's elastic launcher and interprets their exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys

import typer

from ulysses_monitor.common.errors import InputError

__all__ = ["choose_processes", "is_launched", "launch"]


def is_launched() -> bool:
    """Returns whether a launcher (torchrun, deepspeed, srun, …) started this process as a rank."""
    return all(key in os.environ for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def choose_processes(nproc: int | None, sequence_parallel_size: int) -> int:
    """Returns the number of processes to start.

    It is `nproc` if the user set it. Otherwise there is one process per GPU, rounded down to whole
    sequence groups, and at least one group.

    Raises:
        InputError: `nproc` is less than 1.
    """
    if nproc is not None:
        if nproc < 1:
            raise InputError(f"--nproc is {nproc}; expected an integer of 1 or more")
        return nproc
    import torch

    devices = torch.accelerator.device_count()
    groups = devices // sequence_parallel_size
    return max(groups, 1) * sequence_parallel_size


def launch(arguments: list[str], processes: int) -> int:
    """Runs ``python -m ulysses_core.cli`` with `arguments` in `processes` processes.

    Returns:
        0, or the exit code of the first rank that failed; the rank has printed its error.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks print their own errors; the launcher's tables would hide the one clear line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"ulysses-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    command = ["-m", "ulysses_core.cli", *arguments]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return _exit_code(error)
    except (
        SignalException
    ) as error:  # the launcher has stopped the ranks, which saved their records
        name = signal.Signals(error.sigval).name
        typer.echo(f"ulysses: stopped by {name}; the recorded steps are kept", err=True)
        return 1
    return 0


def _exit_code(error: object) -> int:
    """Returns a rank's exit code if it is 2 or 3, otherwise 1: the run failed."""
    failures = error.failures.values()  # type: ignore[attr-defined]
    first = min(failures, key=lambda failure: failure.timestamp)
    codes = [failure.exitcode for failure in failures]
    if first.exitcode in (2, 3):
        return int(first.exitcode)
    return next((code for code in codes if code in (2, 3)), 1)
