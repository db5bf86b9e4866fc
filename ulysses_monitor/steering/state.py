"""What steering remembers, as bytes that travel with a checkpoint; they hold no code."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.policy_set import plain_numbers

__all__ = ["from_bytes", "to_bytes"]

_VERSION = 1
History = Sequence[tuple[tuple[str, ...], npt.NDArray[np.float64]]]


def to_bytes(state: dict[str, Any], history: History) -> bytes:
    """A NumPy archive: the state and the history's names as JSON, its rows as arrays."""
    about = {"version": _VERSION, "state": state, "names": [list(names) for names, _ in history]}
    text = np.frombuffer(json.dumps(about, default=plain_numbers).encode(), np.uint8)
    out = io.BytesIO()
    rows = {f"rows{i}": held for i, (_, held) in enumerate(history)}
    np.savez(out, allow_pickle=False, about=text, **rows)
    return out.getvalue()


def from_bytes(data: bytes, where: str) -> tuple[dict[str, Any], History]:
    """The state and the history of `to_bytes`.

    Args:
        data: the archive.
        where: for the message.

    Raises:
        InputError: it is none, or of a version that is not known.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            about = json.loads(archive["about"].tobytes())
            rows = [archive[f"rows{i}"] for i in range(len(about["names"]))]
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(f"{where}: holds no state of policies: {error}") from None
    if about.get("version") != _VERSION:
        raise InputError(f"{where}: of version {about.get('version')}; allowed is {_VERSION}")
    names = [tuple(each) for each in about["names"]]
    return about["state"], list(zip(names, rows, strict=True))
