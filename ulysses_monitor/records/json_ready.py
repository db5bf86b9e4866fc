"""Converts records and events to what JSON, protobuf and their readers accept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ulysses_monitor.common.masking import mask_secrets
from ulysses_monitor.records import Event

__all__ = ["escape_surrogates", "event_to_dict", "to_jsonable"]


def event_to_dict(event: Event) -> dict[str, Any]:
    """Returns the event as one flat JSON object, with secrets masked."""
    data = mask_secrets(to_jsonable(dict(event.data)))
    return {**data, "kind": event.kind, "step": event.step, "time": event.time}


def to_jsonable(value: Any, depth: int = 20) -> Any:
    """Returns `value` with only what JSON has; everything else becomes text.

    NaN and Inf become text too, because many JSON readers refuse them, and so does what is nested
    deeper than `depth`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if depth == 0:
        return escape_surrogates(f"{type(value).__name__} ...")
    if isinstance(value, Mapping):
        return {escape_surrogates(str(k)): to_jsonable(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(v, depth - 1) for v in value]
    if (
        value is None
        or isinstance(value, int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return escape_surrogates(str(value))


def escape_surrogates(text: str) -> str:
    """Returns `text` with lone surrogates, which UTF-8 cannot encode, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
