"""What policies see of a step's record, the same while training and in a replay."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ulysses_monitor.policies.base import MAX_STEPS
from ulysses_monitor.records import Schema, StepRecord

__all__ = ["policy_view"]


def policy_view(record: StepRecord, max_steps: int | None) -> StepRecord:
    """Returns `record` as policies see it.

    Values are rounded to float32, as the run store keeps them, so that a replay decides what was
    decided while training.

    Args:
        record: the step.
        max_steps: optimizer steps of the whole training, seen as `MAX_STEPS`; None if unknown.
    """
    with np.errstate(over="ignore"):
        values = record.values.astype(np.float32).astype(np.float64)
    schema = record.schema
    if max_steps is not None:
        values = np.append(values, float(max_steps))
        schema = _with_max_steps(schema)
    return StepRecord(record.step, record.time, schema, values)


@lru_cache(maxsize=64)
def _with_max_steps(schema: Schema) -> Schema:
    return Schema((*schema.names, MAX_STEPS))
