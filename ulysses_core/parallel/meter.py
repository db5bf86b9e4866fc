"""Measures the exchange in seconds and bytes, for the metrics ``sp/*``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["ExchangeMeter"]


class ExchangeMeter:
    """Adds up the time and bytes of this rank's all-to-alls, forward and backward.

    On a GPU, events on the stream measure the time. They are read without waiting, so an exchange
    that is still running counts at the next reading.

    Attributes:
        is_counting: whether to count exchanges; False during evaluations.
    """

    def __init__(self) -> None:
        self.is_counting = True
        self._seconds = 0.0
        self._bytes = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, sent: Tensor, kept: int) -> Iterator[None]:
        """Measures one all-to-all in a ``with`` block.

        Args:
            sent: the buffer that this rank sends.
            kept: elements of the buffer that stay on this rank.
        """
        if not self.is_counting:
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
        """Returns the seconds and the bytes sent to other ranks since the last call."""
        while self._events and self._events[0][1].query():
            start, end = self._events.pop(0)
            self._seconds += start.elapsed_time(end) / 1e3
        taken = self._seconds, self._bytes
        self._seconds, self._bytes = 0.0, 0
        return taken
