"""What several sinks take as arguments, and checks that no annotation can say."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.expectations import Expected
from ulysses_monitor.common.settings import Text

__all__ = ["EventKinds", "PathLike", "Patterns", "plain_url", "require_library"]

PathLike = Annotated[Text | Path, Expected("a path")]
"""A path, as text or as an object."""

Patterns = Annotated[Sequence[str], Expected("a list of patterns, such as [train/*]")]
"""Shell-style patterns of metric names."""

EventKinds = Annotated[Sequence[str], Expected("a list of kinds of events, such as [alert, stop]")]
"""Kinds of events."""


def require_library(sink: str, module: str) -> None:
    """Checks that an optional library is installed, without the seconds its import takes.

    Args:
        sink: the sink's name, which is the name of the extra too.
        module: a module that only this library brings.

    Raises:
        InputError: the library is missing; the message says how to install it.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a parent package
        found = None
    if found is None:
        raise InputError(
            f"sink {sink}: needs {module.split('.')[0]}, which is not installed; run "
            f"pip install 'ulysses-toolkit[{sink}]'"
        )


def plain_url(where: str, value: str, instead: str) -> None:
    """Checks for an ``http`` or ``https`` URL without credentials, which messages would repeat.

    Args:
        where: what the URL is for.
        value: the URL.
        instead: where credentials go.

    Raises:
        InputError: the value is not such a URL, or holds a user, a password or a query; a value
            that may hold a secret is not repeated.
    """
    try:
        url = urlsplit(value)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        raise InputError(f"{where} is not a URL; expected http(s)://host:port") from None
    if url.username or url.password or url.query:
        raise InputError(f"{where} is a URL with credentials or a query; {instead}")
    if not good:
        raise InputError(f"{where} is {value!r}; expected http(s)://host:port")
