"""Checks run.json and events.jsonl, in which a crash, a disk or a hand may have left anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["check_description", "load_json", "parse_event"]

_MAX_DEPTH = 64
"""Levels of nesting; what reads or writes JSON fails at some hundreds."""
_LARGEST = 2**63
_REQUIRED = ("status", "starts")
"""A run has these from its start."""


def load_json(data: bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: it is not JSON, or is nested too deep.
    """
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH and _is_deep(content):
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_MAX_DEPTH):
        children = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in children for v in values if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def check_description(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns the entries of run.json that are what they should be, and what is wrong with others.

    Args:
        content: the object in run.json; entries that nobody computes with are not checked.
    """
    odd = [
        f"{key} is {_abbreviate(content[key])}"
        for key, is_sound in _CHECKS.items()
        if content.get(key) is not None and not is_sound(content[key])
    ]
    keys = {problem.partition(" ")[0] for problem in odd}
    missing = [f"{key} is missing" for key in _REQUIRED if key not in content]
    return {k: v for k, v in content.items() if k not in keys}, "; ".join(missing + odd)


def _abbreviate(value: Any) -> str:
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of too many digits
        return "a huge number"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and -_LARGEST < value < _LARGEST  # type: ignore[operator] # False for NaN


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_model(value: object) -> bool:
    counts = ("parameters", "trainable_parameters")
    return isinstance(value, dict) and all(
        value.get(key) is None or _is_count(value[key]) for key in counts
    )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "status": lambda value: isinstance(value, str),
    "engine": lambda value: isinstance(value, str),
    "starts": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "ended": _is_number,
    "step": _is_count,
    "max_steps": _is_count,
    "world_size": _is_count,
    "model": _is_model,
    "config": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict),
}


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Returns the event on a line of events.jsonl; None if it holds none.

    Its `kind` is a text, its `step` an integer, and its `time` a number, or None if it is missing.
    """
    try:
        event = load_json(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    event = {"step": 0, "time": None} | event
    time = event["time"]
    is_timed = time is None or (_is_number(time) and math.isfinite(time))
    return event if _is_count(event["step"]) and is_timed else None
