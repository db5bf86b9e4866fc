"""Records and events in the form that JSON, protobuf and every reader of either can take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ulysses_monitor.masking import without_secrets
from ulysses_monitor.records import Event

__all__ = ["encodable", "event_as_json", "finite"]


def event_as_json(event: Event) -> dict[str, Any]:
    """The event as one flat object, with secrets masked."""
    data = without_secrets(dict(event.data))
    return {"kind": event.kind, "step": event.step, "time": event.time, **finite(data)}


def finite(value: Any) -> Any:
    """JSON has no NaN and no Inf: they become strings, which every reader understands."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def encodable(text: str) -> str:
    """`text` with what UTF-8 cannot encode (lone surrogates) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
