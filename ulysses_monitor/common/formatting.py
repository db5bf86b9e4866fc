"""Formats numbers, times and durations for people; a missing value becomes a dash."""

from __future__ import annotations

import math
import re
from datetime import datetime

__all__ = ["DASH", "change", "count", "duration", "number", "share", "tick", "when"]

DASH = "—"
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def number(value: object, digits: int = 3) -> str:
    """Formats a number with `digits` significant digits and a suffix: k, M, B or T.

    >>> number(12345.6), number(0.012), number(2e-05), number(float("inf")), number(float("nan"))
    ('12.3k', '0.0120', '2.00e-5', '∞', 'NaN')
    >>> number(None)
    '—'
    """
    x = _as_float(value)
    if math.isnan(x):
        return DASH if _is_missing(value) else "NaN"
    return ("\N{MINUS SIGN}" if x < 0 else "") + _magnitude(abs(x), digits)


def tick(value: object, digits: int = 3) -> str:
    """Formats a number like `number`, without trailing zeros: ``1``, ``0.5``, ``2e-5``."""
    return re.sub(r"\.0+(?=\D|$)|(\.\d*[1-9])0+(?=\D|$)", r"\1", number(value, digits))


def _magnitude(x: float, digits: int) -> str:
    if math.isinf(x):
        return "∞"
    x = float(f"{x:.{digits}g}")  # round first: 999.96 becomes 1.00k, not 1000
    if not x:
        return "0"
    if not 1e-3 <= x < 1e15:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    size, suffix = next(((s, t) for s, t in _SUFFIXES if x >= s), (1.0, ""))
    return f"{x / size:#.{digits}g}".rstrip(".") + suffix


def count(value: object) -> str:
    """Formats an integer with separated thousands: ``12,000``."""
    x = _as_float(value)
    return f"{int(x):,}" if math.isfinite(x) else DASH


def share(value: object) -> str:
    """Formats a fraction as a percentage: ``0.83%``."""
    x = _as_float(value)
    if math.isnan(x):
        return DASH
    if 0 < x < 1e-4:
        return "<0.01%"
    return f"{number(100 * x, 2 if x < 0.1 else 3)}%" if x else "0%"


def change(first: object, last: object, digits: int = 3) -> str:
    """Formats a change as ``first → last``; as a single dash if both are missing."""
    before, after = number(first, digits), number(last, digits)
    return DASH if before == after == DASH else f"{before} → {after}"


def duration(seconds: object) -> str:
    """Formats seconds in the two largest units: ``1 h 5 min``."""
    x = _as_float(seconds)
    if not math.isfinite(x):
        return DASH
    if x < 60:
        return f"{tick(x, 2 if x < 10 else 3)} s"
    minutes, hours = int(x // 60), int(x // 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(x % 60)} s"


def when(timestamp: object) -> str:
    """Formats seconds since the epoch as a local date and time: ``25 Nov 2026, 14:05 UTC``."""
    try:
        moment = datetime.fromtimestamp(_as_float(timestamp)).astimezone()
    except (ValueError, OverflowError, OSError):
        return DASH
    return f"{moment.day} {moment:%b %Y, %H:%M %Z}"


def _is_missing(value: object) -> bool:
    """Whether `value` is not a number, not even NaN or its name."""
    return not (isinstance(value, float) or str(value).strip("+-").lower() == "nan")


def _as_float(value: object) -> float:
    """Returns `value` as a float, or NaN. Events hold NaN and Inf as text, which float() reads."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
