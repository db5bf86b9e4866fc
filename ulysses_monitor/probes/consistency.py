"""``param/mismatch/*`` and ``grad/mismatch/*``: whether replicas are still bit for bit the same.

Each rank sums the bits of each tensor to a small integer h, its fingerprint, and sends h and h^2.
By the Cauchy-Schwarz inequality, n * sum(h^2) = sum(h)^2 over n ranks holds only if all h are
equal, and the numbers are small enough for float64 to be exact. So one sum over ranks compares
them all. One more slot per rank shows which rank differs.

Legend: K kinds of tensors (parameter, gradient), S sets of replicas, P trainable parameters,
W ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ulysses_monitor.engines import Engine
from ulysses_monitor.probes.base import Reading
from ulysses_monitor.probes.layout import Layout, metric_names
from ulysses_monitor.probes.sums import split_pieces
from ulysses_monitor.records import Cost

__all__ = ["ReplicaProbe", "fingerprint"]

Array = npt.NDArray[np.float64]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaProbe:
    """Counts parameters whose replicas differ; ``param/odd_rank`` is the first rank that differs.

    Args:
        layout: the parameters.
        engine: an engine with replicas.
    """

    name = "replicas"
    cost: Cost = "sampled"
    maxima = 0
    rechecks = False

    def __init__(self, layout: Layout, engine: Engine) -> None:
        self.layout = layout
        self._engine = engine
        self._ranks, self._rank = dist.get_world_size(), dist.get_rank()
        self._sets, self._set = engine.replica_sets, engine.replica_set
        # n * h stays below 2^26, so that its square is exact in float64's 53 bits.
        self._modulus = 2**26 // (self._ranks // self._sets)
        kinds = ("param", "grad") if engine.replicates_gradients else ("param",)
        self._kinds = len(kinds)
        self.size = 2 * self._kinds * self._sets * len(layout.names) + self._ranks
        self.names = tuple(n for kind in kinds for n in metric_names(f"{kind}/mismatch", layout))
        self.names += ("param/odd_rank/total",)

    def read(self, reading: Reading) -> Tensor:  # noqa: ARG002
        """Returns fingerprints and their squares [2 * K * S * P], then one of all per rank [W]."""
        device = self._engine.device
        fingerprints = torch.zeros(
            self._kinds, self._sets, len(self.layout.names), dtype=torch.int64, device=device
        )
        for replica in self._engine.replicas():
            tensors = (replica.param, replica.grad)[: self._kinds]
            for kind, tensor in enumerate(tensors):
                if tensor is not None:
                    fingerprints[kind, self._set, replica.index] = fingerprint(tensor)
        fingerprints = fingerprints.remainder(self._modulus)
        own = torch.zeros(self._ranks, dtype=torch.float64, device=device)
        own[self._rank] = fingerprints.sum().remainder(self._modulus) + 1
        values = fingerprints.double().flatten()  # [K, S, P] -> [K * S * P]
        return torch.cat([values, values.square(), own])

    def values(self, totals: Array) -> Array:
        """See `Probe.values`."""
        # [2 * K * S * P] -> [2, K, S, P]
        sums, squares = totals[: -self._ranks].reshape(2, self._kinds, self._sets, -1)
        copies = self._ranks // self._sets
        differ = (copies * squares != sums**2).any(axis=1).astype(np.float64)  # [K, S, P] -> [K, P]
        values = [self.layout.aggregate(row) for row in differ]
        return np.append(np.concatenate(values), self._odd_rank(totals[-self._ranks :]))

    def _odd_rank(self, fingerprints: Array) -> float:
        """Returns the first rank that differs from most of its set, or NaN if none does.

        Of two ranks that differ, neither is known to be right; the second one is returned.
        """
        for ranks in self._ranks_of_sets():
            usual = Counter(fingerprints[ranks].tolist()).most_common(1)[0][0]
            odd = [r for r in ranks if fingerprints[r] != usual]
            if odd:
                return float(odd[0])
        return math.nan

    def _ranks_of_sets(self) -> Sequence[Sequence[int]]:
        """Returns the ranks of each set [S]; in an HSDP mesh the shard index varies fastest."""
        return [range(s, self._ranks, self._sets) for s in range(self._sets)]


def fingerprint(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor's bits as integers, modulo 2^64; the order does not matter.

    Summing words of 64 bits is several times as fast as summing smaller integers.
    """
    flat = tensor.detach().contiguous().view(-1)
    in_word = 8 // flat.element_size()
    words, rest = flat.split([len(flat) - len(flat) % in_word, len(flat) % in_word])
    sums = [_words(piece, in_word).sum() for piece in split_pieces(words)]
    sums.append(rest.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
    return torch.stack(sums).sum()


def _words(piece: Tensor, in_word: int) -> Tensor:
    """Returns a piece as 64-bit words; torch requires them to be aligned."""
    aligned = piece.storage_offset() % in_word == 0
    return (piece if aligned else piece.clone()).view(torch.int64)
