"""Checks of what users give to sinks; the values come from YAML as well as from Python."""

from __future__ import annotations

import importlib.util
from typing import Any
from urllib.parse import urlsplit

from ulysses_monitor.common.errors import InputError

__all__ = ["number", "one_of", "plain_url", "require_library", "text"]


def require_library(sink: str, module: str) -> None:
    """Checks that an optional library is installed, without the seconds its import takes.

    Args:
        sink: the sink's name, which is the name of the extra too.
        module: a module that only this library brings.

    Raises:
        InputError: it is missing; the message says how to install it.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a parent package
        found = None
    if found is None:
        raise InputError(
            f"sink {sink}: needs the library {module.split('.')[0]}, which is not installed: "
            f"pip install 'ulysses-toolkit[{sink}]'"
        )


def text(where: str, value: Any, *, optional: bool = True) -> None:
    """Checks for a string that is not empty, or None where it is optional."""
    if value is None and optional:
        return
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: got {value!r}; allowed is text")


def number(where: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Checks for a number from `low` to `high`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{where}: got {value!r}; allowed is {kind} from {low:g} to {high:g}")


def one_of(where: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Checks for one of some words."""
    if value not in allowed:
        raise InputError(f"{where}: got {value!r}; allowed is {', '.join(allowed)}")


def plain_url(where: str, value: str, instead: str) -> None:
    """Checks for an ``http`` or ``https`` URL without credentials, which messages would repeat.

    Args:
        where: what the URL is for.
        value: the URL.
        instead: where credentials go.

    Raises:
        InputError: it is none, or holds a user, a password or a query; it is not repeated then.
    """
    try:
        url = urlsplit(value)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        raise InputError(f"{where}: not a URL; allowed is http(s)://host:port") from None
    if url.username or url.password or url.query:
        raise InputError(f"{where}: the URL holds credentials or a query; {instead}")
    if not good:
        raise InputError(f"{where}: got {value!r}; allowed is http(s)://host:port")
