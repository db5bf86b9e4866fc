"""What the monitor needs of a Trainer: looked for when a training begins, whatever the version."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import rank

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["TRIED", "check_handler", "check_hooks"]

logger = logging.getLogger(__name__)

TRIED = {"transformers": ((4, 57), (5, 24)), "accelerate": ((1, 11), (1, 15))}
"""The oldest and the newest release of each package that `make test-matrix` tries."""

_TRAINER_HOOKS = ("get_batch_samples", "_prepare_inputs", "_get_output_dir")
_ACCELERATOR_HOOKS = ("backward", "clip_grad_norm_")

_FRAMEWORKS = ("llamafactory", "swift", "axolotl", "sentence_transformers", "trl")
"""Modules of frameworks that bring a Trainer of their own, the most specific first."""

_DISTRIBUTIONS = {
    "swift": "ms-swift",
    "sentence_transformers": "sentence-transformers",
}
"""Names of packages that differ from their module's."""


def check_hooks(trainer: Trainer) -> None:
    """Checks that `trainer` has all that is patched; logs once if its version was never tried.

    Raises:
        InputError: something is missing; the message names the framework in use.
    """
    missing = [f"Trainer.{n}" for n in _TRAINER_HOOKS if not hasattr(trainer, n)]
    accelerator = getattr(trainer, "accelerator", None)
    missing += [f"Accelerator.{n}" for n in _ACCELERATOR_HOOKS if not hasattr(accelerator, n)]
    if missing:
        raise InputError(_refusal(", ".join(missing)))
    if rank() == 0:
        _warn_of_untried()


def check_handler(module: ModuleType) -> None:
    """Checks that ``transformers.trainer`` has the class that hands a Trainer's events on.

    Raises:
        InputError: it does not.
    """
    if not hasattr(getattr(module, "CallbackHandler", None), "call_event"):
        raise InputError(_refusal("CallbackHandler.call_event"))


def _refusal(missing: str) -> str:
    (oldest, newest), framework = TRIED["transformers"], _framework()
    within = f" (used by {framework})" if framework else ""
    return (
        f"monitor: transformers {_version('transformers')} with accelerate "
        f"{_version('accelerate')}{within} has no {missing}; expected transformers "
        f"{_dotted(oldest)} to {_dotted(newest)}: install one of these, or call "
        "monitor.watch(model, optimizer) around a loop of your own"
    )


@lru_cache(maxsize=1)
def _warn_of_untried() -> None:
    if untried := list(_find_untried()):
        logger.warning("monitor: %s; the training is watched anyway", "; ".join(untried))


def _find_untried() -> Iterator[str]:
    for package, (oldest, newest) in TRIED.items():
        version = _version(package)
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if numbers and not oldest <= numbers <= newest:
            yield f"{package} {version} is untried, {_dotted(oldest)} to {_dotted(newest)} work"


def _framework() -> str:
    """Returns the name and version of the framework whose Trainer trains; empty if none does."""
    for module in _FRAMEWORKS:
        if module in sys.modules:
            package = _DISTRIBUTIONS.get(module, module)
            return f"{package} {_version(package)}"
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
