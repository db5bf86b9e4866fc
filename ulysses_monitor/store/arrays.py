"""Arrow arrays over numpy's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["to_arrow"]


def to_arrow(values: npt.NDArray[Any]) -> Any:
    """Returns the numbers [N] as an Arrow array without nulls.

    `pa.array` imports pandas to ask whether `values` is a Series. That costs the training a second,
    and resets the warnings that Python has shown: the training would print them again.
    """
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])
