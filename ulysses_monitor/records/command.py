"""Commands: what a person asks of a run while it trains, as words, as an object, as JSON."""

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

__all__ = ["LONGEST_TEXT", "MAX_LR_FACTOR", "RERUN", "Command", "check", "parse_words"]

LONGEST_TEXT = 500
"""Characters of a name or of a reason."""
MAX_LR_FACTOR = 10.0

RERUN = "rerun"
"""What an alert alone may ask for: that its step is computed again, before the weights change."""

_ALL = "*"
_WORDS = "policy=off|shadow|active, policy.NAME=..., lr_factor=0.5, lr_factor.GROUP=..., save, stop"
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
_GROUP = re.compile(r"\*|0|[1-9][0-9]{0,5}")
_LATEST = 1e11
"""Latest time of a command, in seconds since 1970: the year 5138."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a person asks of a run; one command may ask for several things.

    Attributes:
        id: distinguishes the command from others.
        who: the user who gave it.
        why: a sentence for people.
        time: when it was given, in seconds since 1970.
        modes: new modes of policies, by policy name; ``*`` stands for all policies.
        lr_factors: factors on the scheduled learning rate, from 0 to `MAX_LR_FACTOR`, by number of
            the parameter group; ``*`` stands for all groups.
        save: whether to write a checkpoint.
        stop: whether to end the training in an orderly way.

    Raises:
        InputError: a field has the wrong type or is out of bounds.
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
        check(good, "id", self.id, "expected 1 to 64 letters, digits, - and _")
        _check_text("who", self.who)
        _check_text("why", self.why, least=0)
        check(_is_number(self.time, _LATEST), "time", self.time, "expected seconds since 1970")
        _check_modes(self.modes)
        _check_factors(self.lr_factors)
        for name in ("save", "stop"):
            value = getattr(self, name)
            check(isinstance(value, bool), name, value, "allowed: true, false")

    def to_json(self) -> str:
        """Returns the command as one line of JSON."""
        return json.dumps(
            {**vars(self), "modes": {**self.modes}, "lr_factors": {**self.lr_factors}}
        )

    @classmethod
    def from_json(cls, text: str) -> Command:
        """Returns the command that `to_json` wrote.

        Raises:
            InputError: `text` is not a command.
        """
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({error}); expected one JSON object per line") from None
        check(isinstance(given, dict), "the command", given, "expected a JSON object")
        known = [each.name for each in fields(cls)]
        if unknown := [name[:LONGEST_TEXT] for name in given if name not in known]:
            hint = nearest(unknown[0], known)
            check(False, "a key", unknown[0], f"allowed: {', '.join(known)}{hint}")
        if missing := [name for name in ("id", "who", "time") if name not in given]:
            raise InputError(f"{missing[0]} is missing; expected at least id, who and time")
        return cls(**given)

    def describe(self) -> str:
        """Returns the command in plain words."""
        parts = [f"{_policy_text(name)} to {mode}" for name, mode in self.modes.items()]
        for group, factor in self.lr_factors.items():
            of = "" if group == _ALL else f" of group {group}"
            parts.append(f"learning rate{of} x {factor:g}")
        parts += [name for name in ("save", "stop") if getattr(self, name)]
        return "; ".join(parts) or "nothing"


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of a `Command` for words such as ``policy=shadow`` and ``save``.

    Raises:
        InputError: a word is unknown or repeated, or there is none.
    """
    given: dict[tuple[str, str], Any] = {}
    for word in words:
        kind, name, value = _parse(word)
        if (kind, name) in given:
            raise InputError(f"{word!r} sets the same thing as an earlier word; give it once")
        given[kind, name] = value
    if not given:
        raise InputError(f"the command is empty; allowed: {_WORDS}")
    modes = {name: mode for (kind, name), mode in given.items() if kind == "policy"}
    factors = {name: factor for (kind, name), factor in given.items() if kind == "lr_factor"}
    _check_modes(modes)
    _check_factors(factors)
    once = {name: (name, _ALL) in given for name in ("save", "stop")}
    return {"modes": modes, "lr_factors": factors, **once}


def _parse(word: str) -> tuple[str, str, Any]:
    key, equals, value = word.partition("=")
    kind, dot, name = key.partition(".")
    if word in ("save", "stop"):
        return word, _ALL, True
    if kind not in ("policy", "lr_factor") or not equals:
        hint = nearest(kind, ("policy", "lr_factor", "save", "stop"))
        raise InputError(f"the command has {word!r}{hint}; allowed: {_WORDS}")
    name = name if dot else _ALL
    if kind == "lr_factor":
        with suppress(ValueError):  # anything but a number is refused with the other values
            return kind, name, float(value)
    return kind, name, value


def check(is_valid: object, what: str, value: object, rule: str) -> None:
    """Raises an `InputError` unless a value is valid.

    Args:
        is_valid: whether it is.
        what: what the value is, for the message.
        value: the value; the message has its first 100 characters.
        rule: what is valid, as in ``expected a number`` or ``allowed: on, off``.

    Raises:
        InputError: the value is not valid.
    """
    if not is_valid:
        raise InputError(f"{what} is {value!r:.100}; {rule}")


def _check_text(what: str, text: object, least: int = 1) -> None:
    good = isinstance(text, str) and least <= len(text) <= LONGEST_TEXT and text.isprintable()
    check(good, what, text, f"expected {least} to {LONGEST_TEXT} printable characters")


def _check_modes(modes: Mapping[str, Mode]) -> None:
    check(
        isinstance(modes, Mapping), "modes", modes, "expected an object with a mode for each policy"
    )
    for name, mode in modes.items():
        _check_text("a policy's name", name)
        allowed = get_args(Mode)
        where = f"the mode of {_policy_text(name)}"
        check(mode in allowed, where, mode, f"allowed: {', '.join(allowed)}")


def _policy_text(name: str) -> str:
    return "policies" if name == _ALL else f"policy {name}"


def _check_factors(factors: Mapping[str, float]) -> None:
    check(
        isinstance(factors, Mapping),
        "lr_factors",
        factors,
        "expected an object with a number for each group",
    )
    for group, factor in factors.items():
        good = isinstance(group, str) and _GROUP.fullmatch(group)
        check(good, "a group of lr_factor", group, "expected its number, such as 0")
        what = "lr_factor" if group == _ALL else f"lr_factor.{group}"
        check(_is_number(factor, MAX_LR_FACTOR), what, factor, f"expected 0 to {MAX_LR_FACTOR:g}")


def _is_number(value: object, most: float) -> bool:
    """Returns whether `value` is a number from 0 to `most`; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
