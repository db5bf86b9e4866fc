"""The compiled kernels, if this Python has them; torch does the same work, exact but slower."""

from __future__ import annotations

import logging
from types import ModuleType

__all__ = ["KERNELS"]

logger = logging.getLogger(__name__)


def _load() -> ModuleType | None:
    """Returns the module of the kernels, or None without Numba."""
    try:
        from ulysses_monitor.probes import kernels
    except ImportError as error:  # not installed, or built for another NumPy
        logger.debug("monitor: reductions on the CPU run in torch, without Numba: %s", error)
        return None
    return kernels


# Loaded with the probes, not in the first step, whose time is measured.
KERNELS = _load()
"""`ulysses_monitor.probes.kernels`, or None if Numba cannot be imported."""
