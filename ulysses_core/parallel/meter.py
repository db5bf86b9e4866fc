"""What the exchange costs: seconds and bytes, for the metrics ``sp/*``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["ExchangeMeter"]


class ExchangeMeter:
    """Adds up the all-to-alls of this rank, forward and backward.

    On a GPU the time is between events on the stream, read once they have passed: it waits for
    nothing, and an exchange that is still under way counts with the next reading.

    Attributes:
        running: whether exchanges are counted; not those of an evaluation between two steps.
    """

    def __init__(self) -> None:
        self.running = True
        self._seconds = 0.0
        self._bytes = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, sent: Tensor, kept: int) -> Iterator[None]:
        """Around one all-to-all.

        Args:
            sent: all that this rank gives.
            kept: elements of it that stay on this rank.
        """
        if not self.running:
            yield
            return
        self._bytes += (sent.numel() - kept) * sent.element_size()
        if sent.is_cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            self._events.append((events[0], events[1]))
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take(self) -> tuple[float, int]:
        """Seconds, and bytes sent to other ranks, since the last call."""
        while self._events and self._events[0][1].query():
            start, end = self._events.pop(0)
            self._seconds += start.elapsed_time(end) / 1e3
        taken = self._seconds, self._bytes
        self._seconds, self._bytes = 0.0, 0
        return taken
