"""Ulysses sequence parallelism for a Trainer: groups, exchange and attention."""

from ulysses_core.parallel.groups import SequenceGroup, check_size, make_groups
from ulysses_core.parallel.trainer import SequenceParallelHandle, sequence_parallel

__all__ = [
    "SequenceGroup",
    "SequenceParallelHandle",
    "check_size",
    "make_groups",
    "sequence_parallel",
]
