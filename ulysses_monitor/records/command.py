"""What a person asks of a run while it trains: a command, in words, as an object, as JSON."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from time import time as now
from typing import Any, get_args

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.records.action import Mode

__all__ = ["MAX_LR_FACTOR", "Command", "check", "parse_words"]

MAX_LR_FACTOR = 10.0

_ALL = "*"
_WORDS = "policy=off|shadow|active, policy.NAME=..., lr_factor=0.5, lr_factor.GROUP=..., save, stop"
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
_GROUP = re.compile(r"\*|0|[1-9][0-9]{0,5}")
_LONGEST_TEXT = 500
_LATEST = 1e11
"""Seconds since 1970, in the year 5138."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What somebody asks of a run: any of these at once.

    Attributes:
        id: tells it from others.
        who: the user.
        why: a sentence for people.
        time: when it was given, in seconds since 1970.
        modes: of policies by name; under ``*`` of all.
        lr_factors: on the scheduled learning rate, from 0 to `MAX_LR_FACTOR`, by number of the
            parameter group; under ``*`` of all.
        save: whether to write a checkpoint.
        stop: whether to end the training in good order.

    Raises:
        InputError: one of them is of another type or out of bounds.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    who: str
    why: str = ""
    time: float = field(default_factory=now)
    modes: Mapping[str, Mode] = field(default_factory=dict)
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    save: bool = False
    stop: bool = False

    def __post_init__(self) -> None:
        good = isinstance(self.id, str) and _ID.fullmatch(self.id)
        check(good, "id", self.id, "up to 64 letters and digits")
        _check_text("who", self.who)
        _check_text("why", self.why, least=0)
        check(_is_number(self.time, _LATEST), "time", self.time, "seconds since 1970")
        _check_modes(self.modes)
        _check_factors(self.lr_factors)
        for name in ("save", "stop"):
            value = getattr(self, name)
            check(isinstance(value, bool), name, value, "true or false")

    def to_json(self) -> str:
        """The command as one line."""
        return json.dumps(
            {**vars(self), "modes": {**self.modes}, "lr_factors": {**self.lr_factors}}
        )

    @classmethod
    def from_json(cls, text: str) -> Command:
        """The command that `to_json` wrote.

        Raises:
            InputError: it is none.
        """
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"no JSON ({error}); allowed is one object a line") from None
        check(isinstance(given, dict), "the command", given, "an object")
        known = [each.name for each in fields(cls)]
        if unknown := [name[:_LONGEST_TEXT] for name in given if name not in known]:
            hint = nearest(unknown[0], known)
            check(False, "a key", unknown[0], f"one of {', '.join(known)}{hint}")
        if missing := [name for name in ("id", "who", "time") if name not in given]:
            raise InputError(f"{missing[0]} is missing; needed are id, who and time")
        return cls(**given)

    def describe(self) -> str:
        """The command in plain words."""
        parts = [f"{_of_policy(name)} to {mode}" for name, mode in self.modes.items()]
        for group, factor in self.lr_factors.items():
            of = "" if group == _ALL else f" of group {group}"
            parts.append(f"learning rate{of} x {factor:g}")
        parts += [name for name in ("save", "stop") if getattr(self, name)]
        return "; ".join(parts) or "nothing"


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """The fields of a `Command` that words such as ``policy=shadow`` and ``save`` stand for.

    Raises:
        InputError: a word is not known or is said twice, or there is none.
    """
    said: dict[tuple[str, str], Any] = {}
    for word in words:
        kind, name, value = _parse(word)
        if (kind, name) in said:
            raise InputError(f"{word!r}: the same is said before; say it once")
        said[kind, name] = value
    if not said:
        raise InputError(f"nothing is said that the run should do; allowed is {_WORDS}")
    modes = {name: mode for (kind, name), mode in said.items() if kind == "policy"}
    factors = {name: factor for (kind, name), factor in said.items() if kind == "lr_factor"}
    _check_modes(modes)
    _check_factors(factors)
    once = {name: (name, _ALL) in said for name in ("save", "stop")}
    return {"modes": modes, "lr_factors": factors, **once}


def _parse(word: str) -> tuple[str, str, Any]:
    key, equals, value = word.partition("=")
    kind, dot, name = key.partition(".")
    if word in ("save", "stop"):
        return word, _ALL, True
    if kind not in ("policy", "lr_factor") or not equals:
        hint = nearest(kind, ("policy", "lr_factor", "save", "stop"))
        raise InputError(f"{word!r} is not known{hint}; allowed is {_WORDS}")
    name = name if dot else _ALL
    if kind == "lr_factor":
        with suppress(ValueError):  # what is no number is refused with the other values
            return kind, name, float(value)
    return kind, name, value


def check(good: object, what: str, value: object, allowed: str) -> None:
    """Raises an `InputError` that names `what`, its `value` and what is allowed, unless `good`."""
    if not good:
        raise InputError(f"{what} is {value!r:.100}; allowed is {allowed}")


def _check_text(what: str, text: object, least: int = 1) -> None:
    good = isinstance(text, str) and least <= len(text) <= _LONGEST_TEXT and text.isprintable()
    check(good, what, text, f"a text of {least} to {_LONGEST_TEXT} printable characters")


def _check_modes(modes: Mapping[str, Mode]) -> None:
    check(isinstance(modes, Mapping), "modes", modes, "a mode by policy")
    for name, mode in modes.items():
        _check_text("a policy's name", name)
        allowed = get_args(Mode)
        check(mode in allowed, f"the mode of {_of_policy(name)}", mode, ", ".join(allowed))


def _of_policy(name: str) -> str:
    return "policies" if name == _ALL else f"policy {name}"


def _check_factors(factors: Mapping[str, float]) -> None:
    check(isinstance(factors, Mapping), "lr_factors", factors, "a number by group")
    for group, factor in factors.items():
        good = isinstance(group, str) and _GROUP.fullmatch(group)
        check(good, "a group of lr_factor", group, "its number, such as 0")
        what = "lr_factor" if group == _ALL else f"lr_factor.{group}"
        check(_is_number(factor, MAX_LR_FACTOR), what, factor, f"0 to {MAX_LR_FACTOR:g}")


def _is_number(value: object, most: float) -> bool:
    """Whether it is a number from 0; NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
