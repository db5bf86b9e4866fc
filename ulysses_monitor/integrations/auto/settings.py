"""The settings of `ulysses attach`, as they travel through the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.store import IfExists

__all__ = ["STARTUP", "Settings"]

STARTUP = Path(__file__).resolve().parent / "startup"
"""The folder with the `sitecustomize.py` that every Python process of the command runs."""

_PREFIX = "ULYSSES_ATTACH_"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the trainings of one command are recorded."""

    run_dir: Path
    """The first training's run directory, absolute: the command may change its folder."""
    session: str
    """Names this one start of `ulysses attach`, to tell its runs from earlier ones."""
    notes: Path | None = None
    """The file that takes the notes, if anybody reads them."""
    sample_every: int = 10
    """See `Monitor`."""
    if_exists: IfExists = "refuse"
    """See `Monitor`."""
    tensorboard: bool = True
    """See `Monitor`."""

    def __post_init__(self) -> None:
        """Refuses what is not allowed, by the name of the environment variable."""
        _check(self.run_dir.is_absolute(), "run_dir", self.run_dir, "an absolute path")
        _check(bool(self.session), "session", self.session, "a name")
        _check(self.sample_every >= 1, "sample_every", self.sample_every, "1 or more")
        allowed = get_args(IfExists)
        _check(self.if_exists in allowed, "if_exists", self.if_exists, ", ".join(allowed))

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with these settings, and with the start-up folder on Python's path."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        texts = {_PREFIX + k.upper(): _text(v) for k, v in values.items() if v is not None}
        before = [p for p in base.get("PYTHONPATH", "").split(os.pathsep) if p]
        path = [str(STARTUP), *(p for p in before if p != str(STARTUP))]
        return {**base, **texts, "PYTHONPATH": os.pathsep.join(path)}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Reads what `environment()` wrote.

        Raises:
            InputError: a variable is missing, or its value is not allowed.
        """
        texts = {
            f.name: environment[key]
            for f in fields(cls)
            if (key := _PREFIX + f.name.upper()) in environment
        }
        for name in ("run_dir", "session"):
            _check(name in texts, name, "not set", "what `ulysses attach` sets")
        return cls(**{name: _value(name, text) for name, text in texts.items()})


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _value(name: str, text: str) -> Any:
    if name in ("run_dir", "notes"):
        return Path(text)
    if name == "sample_every":
        _check(text.isdecimal(), name, text, "1 or more")
        return int(text)
    if name == "tensorboard":
        _check(text in ("0", "1"), name, text, "0, 1")
        return text == "1"
    return text


def _check(good: bool, name: str, got: object, allowed: str) -> None:
    if not good:
        raise InputError(f"{_PREFIX}{name.upper()} is {got}; allowed is {allowed}")
