"""Splits the world into sequence groups; the groups together are data-parallel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from ulysses_core.parallel.meter import ExchangeMeter
from ulysses_monitor.common.errors import InputError

__all__ = ["SequenceGroup", "check_size", "make_groups"]


@dataclass(frozen=True)
class SequenceGroup:
    """The sequence group of this rank: consecutive ranks that share rows.

    Attributes:
        size: number of ranks in the group.
        rank: this rank's index in the group, and the index of its slice of every row.
        group: the process group; None if `size` is 1.
        data_rank: index of the group among all groups.
        data_size: number of groups.
        meter: counts the cost of this rank's exchanges.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
    data_rank: int
    data_size: int
    meter: ExchangeMeter = field(default_factory=ExchangeMeter, compare=False)


def check_size(size: int, world_size: int) -> None:
    """Checks that the world divides into sequence groups of `size`.

    Raises:
        InputError: `size` does not divide `world_size`.
    """
    if size < 1:
        raise InputError(f"sequence_parallel_size is {size}; expected an integer of 1 or more")
    if world_size % size:
        divisors = [str(d) for d in range(1, world_size + 1) if world_size % d == 0]
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise InputError(
            f"sequence_parallel_size is {size}, which does not divide {processes}; "
            f"allowed: {', '.join(divisors)}, or start {size} processes (--nproc {size})"
        )


def make_groups(size: int) -> SequenceGroup:
    """Makes the sequence groups and returns this rank's; every rank of the world must call it.

    Raises:
        InputError: `size` does not divide the world.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    check_size(size, world)
    own_group = None
    if size > 1:
        for start in range(0, world, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= rank < start + size:
                own_group = group
    return SequenceGroup(size, rank % size, own_group, rank // size, world // size)
