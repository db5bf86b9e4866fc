"""What steering remembers, as bytes that travel with a checkpoint; they contain no code."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.policy_set import numpy_to_python

__all__ = ["from_bytes", "to_bytes"]

_VERSION = 1
History = Sequence[tuple[tuple[str, ...], npt.NDArray[np.float64]]]


def to_bytes(state: dict[str, Any], history: History) -> bytes:
    """Packs a state into a NumPy archive: JSON for the state and names, arrays for the history."""
    about = {"version": _VERSION, "state": state, "names": [list(names) for names, _ in history]}
    text = np.frombuffer(json.dumps(about, default=numpy_to_python).encode(), np.uint8)
    out = io.BytesIO()
    rows = {f"rows{i}": held for i, (_, held) in enumerate(history)}
    np.savez(out, allow_pickle=False, about=text, **rows)
    return out.getvalue()


def from_bytes(data: bytes, where: str) -> tuple[dict[str, Any], History]:
    """Unpacks the state and the history of `to_bytes`.

    Args:
        data: the archive.
        where: the source of `data`, for messages.

    Raises:
        InputError: `data` is not such an archive, or of an unknown version.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            about = json.loads(archive["about"].tobytes())
            rows = [archive[f"rows{i}"] for i in range(len(about["names"]))]
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(f"{where}: is not a state of policies: {error}") from None
    if about.get("version") != _VERSION:
        raise InputError(f"{where}: has version {about.get('version')}; allowed: {_VERSION}")
    names = [tuple(each) for each in about["names"]]
    return about["state"], list(zip(names, rows, strict=True))
