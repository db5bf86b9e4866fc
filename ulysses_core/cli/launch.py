"""Starting one process per rank with torch's elastic launcher, and what their exits mean."""

from __future__ import annotations

import logging
import os
import signal
import sys

import typer

from ulysses_monitor.common.errors import InputError

__all__ = ["choose_processes", "is_launched", "launch"]


def is_launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, Slurm's, …) started this process as a rank."""
    return all(key in os.environ for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def choose_processes(asked: int | None, sequence_parallel_size: int) -> int:
    """Processes to start: what was asked for, else one per GPU, else one sequence group.

    Raises:
        InputError: less than 1 was asked for.
    """
    if asked is not None:
        if asked < 1:
            raise InputError(f"--nproc is {asked}; allowed is 1 or more")
        return asked
    import torch

    devices = torch.accelerator.device_count()
    groups = devices // sequence_parallel_size
    return max(groups, 1) * sequence_parallel_size


def launch(arguments: list[str], processes: int) -> int:
    """Runs ``python -m ulysses_core.cli`` with `arguments` in `processes` processes.

    Returns:
        0, or the exit code of the rank that failed first; its message is on standard error.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks report their own errors; the launcher's tables would bury the one clear line.
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
    except SignalException as error:  # the launcher has ended the ranks, which closed their records
        name = signal.Signals(error.sigval).name
        typer.echo(f"ulysses: stopped by {name}; what was recorded is kept", err=True)
        return 1
    return 0


def _exit_code(error: object) -> int:
    """2 and 3 mean what they mean here; whatever else a rank died of is a failed run."""
    failures = error.failures.values()  # type: ignore[attr-defined]
    first = min(failures, key=lambda failure: failure.timestamp)
    codes = [failure.exitcode for failure in failures]
    if first.exitcode in (2, 3):
        return int(first.exitcode)
    return next((code for code in codes if code in (2, 3)), 1)
