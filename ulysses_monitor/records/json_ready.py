"""Records and events in the form that JSON, protobuf and every reader of either can take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ulysses_monitor.common.masking import without_secrets
from ulysses_monitor.records import Event

__all__ = ["encodable", "event_as_json", "plain"]


def event_as_json(event: Event) -> dict[str, Any]:
    """The event as one flat object, with secrets masked."""
    data = without_secrets(plain(dict(event.data)))
    return {**data, "kind": event.kind, "step": event.step, "time": event.time}


def plain(value: Any, depth: int = 20) -> Any:
    """`value` of nothing but what JSON has, at any depth; what it has not becomes text.

    So do NaN and Inf, which many readers of JSON refuse, and what is nested too deep.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if depth == 0:
        return encodable(f"{type(value).__name__} ...")
    if isinstance(value, Mapping):
        return {encodable(str(k)): plain(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, depth - 1) for v in value]
    if (
        value is None
        or isinstance(value, int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return encodable(str(value))


def encodable(text: str) -> str:
    """`text` with what UTF-8 cannot encode (lone surrogates) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
