"""Data x sequence process groups over any world size."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from ulysses_core.parallel.meter import ExchangeMeter
from ulysses_monitor.common.errors import InputError

__all__ = ["SequenceGroup", "check_size", "make_groups"]


@dataclass(frozen=True)
class SequenceGroup:
    """The sequence group of this rank: consecutive ranks that share the same rows.

    Attributes:
        size: ranks in the group.
        rank: this rank's place in it; it holds the rank-th slice of every row.
        group: the process group, None where `size` is 1.
        data_rank: index of the group among all groups.
        data_size: number of groups.
        meter: what this rank's exchanges cost.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
    data_rank: int
    data_size: int
    meter: ExchangeMeter = field(default_factory=ExchangeMeter, compare=False)


def check_size(size: int, world_size: int) -> None:
    """Checks that sequence groups of `size` fill the world.

    Raises:
        InputError: they do not.
    """
    if size < 1:
        raise InputError(f"sequence_parallel_size is {size}; allowed is 1 or more")
    if world_size % size:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise InputError(
            f"sequence_parallel_size is {size} but {_processes(world_size)} launched; it must "
            f"divide the number of processes: use one of {divisors}, or --nproc {size}"
        )


def _processes(n: int) -> str:
    return "1 process is" if n == 1 else f"{n} processes are"


def make_groups(size: int) -> SequenceGroup:
    """Makes the sequence groups; every rank of the world must call it.

    Raises:
        InputError: `size` does not divide the world.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    check_size(size, world)
    mine = None
    if size > 1:
        for start in range(0, world, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= rank < start + size:
                mine = group
    return SequenceGroup(size, rank % size, mine, rank // size, world // size)
