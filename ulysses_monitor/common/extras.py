"""Packages that only some parts need: whether they are there, and what to install if not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from ulysses_monitor.common.errors import InputError

__all__ = ["explain_missing", "find_missing", "is_installed"]

_CORE = ("accelerate", "datasets", "deepspeed", "peft", "tokenizers", "transformers", "trl")

_EXTRAS = {
    "matplotlib": "plots",
    "rouge_score": "text-metrics",
    "sacrebleu": "text-metrics",
    "tensorboard": "tensorboard",
} | dict.fromkeys(_CORE, "core")
"""The extra of this package that installs each of the packages."""


def is_installed(package: str) -> bool:
    """Returns whether `package` can be imported, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a test or a script has put something in its place
        return False
    # A folder of this name in the working directory has no origin.
    return spec is not None and spec.origin is not None


def find_missing(extra: str) -> list[str]:
    """Returns the packages of `extra` that are not installed."""
    return [p for p, owner in _EXTRAS.items() if owner == extra and not is_installed(p)]


@contextmanager
def explain_missing(where: str) -> Iterator[None]:
    """Turns the failed import of an optional package into an `InputError` that says what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise InputError(
            f"{where}: {package} is not installed; run "
            f"pip install 'ulysses-toolkit[{_EXTRAS[package]}]'"
        ) from None
