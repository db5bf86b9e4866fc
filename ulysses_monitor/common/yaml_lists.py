"""Lists in YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ulysses_monitor.common.errors import InputError

__all__ = ["parse_list", "read_list"]


def read_list(path: Path, key: str) -> list[Any]:
    """Reads a YAML file; see `parse_list`.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{key} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{key} {path}: not UTF-8: {error}") from None
    return parse_list(text, key, str(path))


def parse_list(text: str, key: str, where: str) -> list[Any]:
    """Parses YAML that is a list, or a mapping of `key` alone to a list.

    Raises:
        InputError: it is something else.
    """
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2025-13-01 is a ValueError
        problem = " ".join(str(error).split())
        raise InputError(f"{key} {where}: not valid YAML: {problem}") from None
    found = parsed.get(key) if isinstance(parsed, Mapping) else parsed
    if not isinstance(found, list):
        raise InputError(f"{key} {where}: holds no list; expected a list, or one under {key}")
    others = [other for other in parsed if other != key] if isinstance(parsed, Mapping) else []
    if others:
        raise InputError(f"{key} {where}: has the key {others[0]!r}; allowed: {key}")
    return found
