"""What the launcher tells a process before anything is distributed."""

from __future__ import annotations

import os

__all__ = ["launched_rank"]

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched_rank() -> int:
    """Returns the rank that a launcher gave this process, 0 without a launcher."""
    given = (os.environ[name] for name in _RANK_VARIABLES if name in os.environ)
    text = next(given, "0")
    return int(text) if text.isdigit() else 0
