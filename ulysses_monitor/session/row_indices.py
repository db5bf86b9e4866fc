"""Which rows of the dataset a batch holds: what a DataLoader's sampler drew for it.

A loader yields its batches in the order in which it drew their indices, also with workers that
prefetch. So the indices are noted as they are drawn, and each batch takes the oldest ones. Drawing
is not changed: no random number is used, no order is another.

A plain loop may use a batch twice or not at all, so there a row finds its index by its hash.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo, patch_method
from ulysses_monitor.probes.fingerprints import row_numbers

__all__ = ["HashedIndices", "RowIndices", "loader_of"]

_MOST_HASHES = 1 << 16
"""Rows that a loop has drawn and not yet used."""


def loader_of(iterator: Any) -> Any:
    """Returns the loader that a generator, such as that of accelerate's loaders, iterates over."""
    frame = getattr(iterator, "gi_frame", None)
    return iterator if frame is None else frame.f_locals.get("self")


class RowIndices:
    """Notes the indices that one loader draws, for each new iteration over it.

    Args:
        loader: a DataLoader, or accelerate's wrapper of one.

    Attributes:
        loader: it.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._drawn: deque[list[Any]] = deque()
        self._undo: Undo = lambda: None
        self._inner = getattr(loader, "base_dataloader", loader)
        if isinstance(self._inner, DataLoader) and _has_indices(self._inner):
            self._undo = patch_method(self._inner, "_get_iterator", self._get_iterator)

    def undo(self) -> None:
        """Puts the loader's method back."""
        self._undo()

    def take(self) -> list[int] | None:
        """Returns the indices of the next batch; None if they are not known."""
        if not self._drawn:
            return None
        drawn = self._drawn.popleft()
        return drawn if all(type(index) is int for index in drawn) else None

    def _get_iterator(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lets the loader take its indices from a sampler that notes them."""
        self._drawn.clear()
        inner = self._inner
        sampler = inner.batch_sampler
        # A DataLoader refuses a new sampler; it asks for this one once, to make its iterator.
        object.__setattr__(inner, "batch_sampler", _Noting(sampler, self._drawn))
        try:
            return original(*args, **kwargs)
        finally:
            object.__setattr__(inner, "batch_sampler", sampler)


class HashedIndices(RowIndices):
    """Knows the indices of the rows that a loop draws from a loader, by the hash of each row.

    Args:
        loader: a DataLoader, or accelerate's wrapper of one.
        guard: calls what looks at a batch.
    """

    def __init__(self, loader: Any, guard: Guard) -> None:
        super().__init__(loader)
        self._guard = guard
        self._by_hash: OrderedDict[int, deque[int]] = OrderedDict()
        self._undo_iterator: Undo = lambda: None

    def undo(self) -> None:
        """Puts the loader's methods back."""
        self._undo_iterator()
        super().undo()

    def find(self, digest: int) -> int | None:
        """Returns the index of the row with a hash that was drawn first; None if it is unknown."""
        found = self._by_hash.get(digest)
        if not found:
            return None
        # Equal rows are used in the order in which they were drawn; one row may be used twice.
        return found.popleft() if len(set(found)) > 1 else found[0]

    def _get_iterator(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._by_hash.clear()
        iterator = super()._get_iterator(original, *args, **kwargs)
        self._undo_iterator = patch_method(iterator, "_next_data", self._next_data)
        return iterator

    def _next_data(self, original: Callable[[], Any]) -> Any:
        data = original()
        self._guard.call("indices of rows", lambda: self._note(data), None)
        return data

    def _note(self, data: Any) -> None:
        indices, numbers = self.take(), row_numbers(data)
        if indices is None or numbers is None or len(numbers) != len(indices):
            return
        if numbers.device.type != "cpu":  # reading it would make the host wait
            return
        for digest, index in zip(numbers[:, 0].tolist(), indices, strict=True):
            self._by_hash.setdefault(int(digest), deque(maxlen=64)).append(index)
        while len(self._by_hash) > _MOST_HASHES:
            self._by_hash.popitem(last=False)


class _Noting:
    """A batch sampler that notes what another one draws."""

    def __init__(self, sampler: Any, drawn: deque[list[Any]]) -> None:
        self._sampler, self._drawn = sampler, drawn

    def __iter__(self) -> Iterator[Sequence[Any]]:
        # A sampler may draw random numbers as soon as it is asked for its iterator.
        return self._note(iter(self._sampler))

    def _note(self, drawing: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        for indices in drawing:
            self._drawn.append([*indices] if isinstance(indices, list | tuple) else [])
            yield indices

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def _has_indices(loader: DataLoader[Any]) -> bool:
    """Whether the loader draws indices of a dataset and yields batches in that order."""
    is_ordered = getattr(loader, "in_order", True)
    return (
        loader.batch_sampler is not None
        and is_ordered
        and not isinstance(loader.dataset, IterableDataset)
    )
