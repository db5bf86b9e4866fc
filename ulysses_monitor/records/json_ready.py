"""Records and events in the form that JSON, protobuf and every reader of either can take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ulysses_monitor.common.masking import mask_secrets
from ulysses_monitor.records import Event

__all__ = ["escape_surrogates", "event_to_dict", "to_jsonable"]


def event_to_dict(event: Event) -> dict[str, Any]:
    """The event as one flat object, with secrets masked."""
    data = mask_secrets(to_jsonable(dict(event.data)))
    return {**data, "kind": event.kind, "step": event.step, "time": event.time}


def to_jsonable(value: Any, depth: int = 20) -> Any:
    """`value` of nothing but what JSON has, at any depth; what it has not becomes text.

    So do NaN and Inf, which many readers of JSON refuse, and what is nested too deep.
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
    """`text` with what UTF-8 cannot encode (lone surrogates) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
