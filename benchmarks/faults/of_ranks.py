"""Faults that only several processes have."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.faults.ranks import RankTraining

__all__ = ["RANK_FAULTS", "RankFault"]

ONSET = 30

_DRIFT = ("replica_drift",)


@dataclass(frozen=True)
class RankFault:
    """See `benchmarks.faults.registry.Fault`."""

    name: str
    breaks: Callable[[RankTraining], None]
    onset: int
    names: tuple[str, ...]


RANK_FAULTS: dict[str, RankFault] = {}


def _fault(
    *names: str, onset: int = 1
) -> Callable[[Callable[[RankTraining], None]], Callable[[RankTraining], None]]:
    def declare(breaks: Callable[[RankTraining], None]) -> Callable[[RankTraining], None]:
        RANK_FAULTS[breaks.__name__] = RankFault(breaks.__name__, breaks, onset, names)
        return breaks

    return declare


@_fault(*_DRIFT, onset=ONSET)
def noise_differs_by_rank(t: RankTraining) -> None:
    def add(training: RankTraining, step: int) -> None:
        if step >= ONSET:
            draw = torch.Generator().manual_seed(1000 * step + training.rank)
            for grad in training.gradients().values():
                grad += 1e-4 * torch.randn(grad.shape, generator=draw)

    t.on_gradients = add


@_fault(*_DRIFT)
def gradients_not_reduced(t: RankTraining) -> None:
    def never(training: RankTraining) -> None:
        training.ddp.require_backward_grad_sync = False  # as no_sync() leaves it

    t.on_wrapped = never


@_fault("same_data_on_ranks")
def same_rows_on_both_ranks(t: RankTraining) -> None:
    t.seed_of_rows = lambda seed, _: seed


@_fault("straggler", onset=ONSET)
def one_rank_is_slow(t: RankTraining) -> None:
    def linger(training: RankTraining, step: int) -> None:
        if step >= ONSET and training.rank == 1:
            time.sleep(0.1)

    t.on_step = linger


@_fault(*_DRIFT)
def clipped_by_the_norm_of_a_part(t: RankTraining) -> None:
    def clip(training: RankTraining) -> None:
        held = list(training.gradients().values())
        own = held[training.rank :: 2]  # each rank looks at the parameters that it would shard
        norm = torch.stack([grad.norm() for grad in own]).norm()
        for grad in held:
            grad.mul_((0.3 / (norm + 1e-6)).clamp(max=1.0))

    t.clips = clip


@_fault(*_DRIFT)
def a_parameter_not_broadcast(t: RankTraining) -> None:
    def ignore(training: RankTraining) -> None:
        nn.init.normal_(
            training.model.positions.weight,
            std=0.05,
            generator=torch.Generator().manual_seed(training.rank),
        )
        DDP = nn.parallel.DistributedDataParallel  # noqa: N806 - a class
        DDP._set_params_and_buffers_to_ignore_for_model(training.model, ["positions.weight"])

    t.on_model = ignore


@_fault(*_DRIFT, onset=ONSET)
def one_rank_skips_a_step(t: RankTraining) -> None:
    def skip(training: RankTraining, step: int) -> None:
        if step == ONSET and training.rank == 1:
            for grad in training.gradients().values():
                grad.zero_()

    t.on_gradients = skip


@_fault(*_DRIFT, onset=ONSET)
def a_bit_flips_in_one_rank(t: RankTraining) -> None:
    def flip(training: RankTraining, step: int) -> None:
        if step == ONSET and training.rank == 1:
            weight = training.model.head.weight.detach().view(-1)
            weight[:1].view(torch.int32).bitwise_xor_(1 << 20)

    t.on_step = flip


@_fault()
def positions_begin_anew_on_each_rank(t: RankTraining) -> None:
    t.splits_rows = True
    t.positions = lambda right: right - right[0]


@_fault()
def packed_documents_leak(t: RankTraining) -> None:
    t.documents, t.leaks = 2, True
