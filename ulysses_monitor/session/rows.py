"""The rows that a step trains on: what this rank saw, in a ring, a file, and at an alert an event.

Nothing is copied to the host that would make it wait: the copy of a step's numbers is started
before that of the step's vector, on the same stream, and read after it.

Legend: R rows of a micro-batch, n rows of a step, C `COLUMNS`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ulysses_monitor.common.again import is_computing_again
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import Undo
from ulysses_monitor.common.ranks import gather_bytes, rank, world_size
from ulysses_monitor.engines import Engine, do_nothing
from ulysses_monitor.probes import Probe
from ulysses_monitor.probes.fingerprints import losses_of_call, row_numbers
from ulysses_monitor.probes.rows import RowProbe, rows_of
from ulysses_monitor.records import Alert
from ulysses_monitor.records.rows import COLUMNS, Row, name_rows, sort_rows
from ulysses_monitor.store import RowsFile

__all__ = ["RowLog"]

_MOST_ROWS = 1024
"""Rows of a step that a rank keeps."""
_MOST_IN_ALERT = 16
_MOST_IN_EVENT = 1024
_MOST_EVENTS = 200
"""Events with rows in one run."""

_ASKED = "rows/asked"
_ABOUT_ROWS = ("train/loss/", "train/loss_rank_std/", "grad/nonfinite", "grad/norm/")
"""What an alert is about if the rows of its step may be the cause."""


class RowLog:
    """Keeps the fingerprints of the rows of the latest steps, on every rank.

    Args:
        keep: steps to keep; 0 switches everything off.
        engine: what is trained.
        guard: calls what sees a batch.

    Attributes:
        probes: the one that carries the most suspicious rows in the step's vector; none if off.
        find_index: returns the index of a row by its hash, for batches that came without.
        is_given: whether the training hands its batches over, so that none is taken from the
            model's calls.
    """

    def __init__(self, keep: int, engine: Engine, guard: Guard) -> None:
        self._keep, self._engine, self._guard = keep, engine, guard
        self._probe = RowProbe(lambda: self._table, engine.device) if keep else None
        self.probes: list[Probe] = [] if self._probe is None else [self._probe]
        self.is_given = False
        self.find_index: Callable[[int], int | None] = lambda _: None
        self._file: RowsFile | None = None
        self._batches: list[Tensor] = []
        self._losses: list[Tensor | None] = []
        self._calls, self._losses_of_calls = 0, dict[int, Tensor]()
        self._table: Tensor | None = None
        self._host: Tensor | None = None
        self._ring: deque[tuple[int, list[Row]]] = deque(maxlen=max(1, keep))
        self._shared: dict[int, list[Row]] = {}
        self._asked: dict[int, list[str]] = {}
        self._events = 0

    def open(self, run_dir: Path) -> None:
        """Writes this rank's rows to the run directory from now on."""
        if self._keep:
            self._file = RowsFile(run_dir, rank(), self._keep)

    # -- what the training shows ---------------------------------------------------------------

    def see(
        self,
        batch: Any,
        *,
        indices: Sequence[int] | None = None,
        losses: Tensor | None = None,
        is_shifted: bool = True,
    ) -> None:
        """Adds a micro-batch of the coming step.

        Args:
            batch: the micro-batch, see `row_numbers`.
            indices: the places of its rows in the dataset. Where each gives several rows, such as
                the two sides of a preference, they are the first, the second, ... of each.
            losses: the loss of each row [R].
            is_shifted: see `row_numbers`.
        """
        self._guarded(lambda: self._see(batch, indices, losses, is_shifted))

    def _see(
        self, batch: Any, indices: Sequence[int] | None, losses: Tensor | None, is_shifted: bool
    ) -> None:
        if not self._keep or sum(map(len, self._batches)) >= _MOST_ROWS:
            return
        with torch.no_grad():
            numbers = row_numbers(batch, is_shifted)
            if numbers is None:
                return
            count = len(numbers)
            places = torch.full((count,), torch.nan, dtype=torch.float64)
            if indices and count % len(indices) == 0:
                places = torch.tensor([*indices] * (count // len(indices)), dtype=torch.float64)
            first = torch.full((count,), float(len(self._batches)), dtype=torch.float64)
            about = torch.stack([first, places], dim=1).to(numbers.device, non_blocking=True)
            self._batches.append(torch.cat([about, numbers], dim=1))  # [R, C - 1]
            self._losses.append(losses)

    def give(self, batch: Any, losses: Tensor | None) -> None:
        """Adds a micro-batch that the training hands over itself; see `see`.

        From now on, the calls of the model give no rows: these are the same.
        """
        if not self.is_given:
            self.is_given = True
            self._batches, self._losses = [], []
        self.see(batch, losses=losses)

    def hook(self, model: nn.Module) -> Undo:
        """Looks at the calls of `model` that are trained on: their rows, and their losses.

        Args:
            model: what the training calls, with its wrappers.
        """
        if not self._keep:
            return do_nothing

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            is_trained = module.training and torch.is_grad_enabled()
            if is_trained and not is_computing_again():
                self._guarded(lambda: self._see_call(args, kwargs, output))

        return model.register_forward_hook(see, with_kwargs=True).remove

    def _see_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Sees one call of the model, whose logits and labels give the losses of its rows."""
        number, self._calls = self._calls, self._calls + 1
        if not self.is_given:
            self._see((*args, dict(kwargs)) if args else kwargs, None, None, True)
            number = len(self._batches) - 1
        with torch.no_grad():
            losses = losses_of_call(self._engine.model, kwargs, output)
        if losses is not None:
            self._losses_of_calls[number] = losses

    def _guarded(self, function: Any) -> None:
        self._guard.call("fingerprints of rows", function, None)

    # -- one step ------------------------------------------------------------------------------

    def collect_sums(self) -> dict[str, float]:
        """Returns this rank's number for the step's vector; starts the copy of its rows."""
        if not self._keep:
            return {}
        self._table = self._host = None
        self._guarded(self._join)
        self._batches, self._losses = [], []
        self._calls, self._losses_of_calls = 0, {}
        return {_ASKED: float(next(iter(self._asked), 0))}

    def _join(self) -> None:
        """Makes the table of the step [n, C], where the batches are and on the host."""
        parts = []
        for i, numbers in enumerate(self._batches):
            parts.append(torch.cat([numbers, self._losses_of(i).unsqueeze(1)], dim=1))
        if parts:
            self._table = torch.cat(parts)[:_MOST_ROWS]
            # Only on the device of the step's vector is this copy done when that one is.
            is_there = self._table.device == self._engine.device
            self._host = self._table.to("cpu", non_blocking=is_there)

    def _losses_of(self, number: int) -> Tensor:
        """Returns the losses of a micro-batch's rows [R], minus infinity for unknown."""
        numbers, losses = self._batches[number], self._losses[number]
        # Where a micro-batch is called once, the calls come in the order of the micro-batches.
        if losses is None and self._calls == len(self._batches):
            losses = self._losses_of_calls.get(number)
        if losses is None or losses.shape != (len(numbers),):
            return torch.full_like(numbers[:, 0], -torch.inf)
        return losses.detach().to(numbers.device, torch.float64, non_blocking=True)

    def end_reading(self, step: int, sums: Mapping[str, float]) -> list[dict[str, Any]]:
        """Keeps the rows of a step that was read; all ranks call it after the step's vector.

        Returns:
            What an event says of the rows of an earlier step, if an alert asked for them.
        """
        if not self._keep:
            return []
        self._guarded(lambda: self._keep_step(step))
        asked = int(sums[_ASKED])
        return [self._gather(asked)] if asked else []

    def _keep_step(self, step: int) -> None:
        host, self._host, self._table = self._host, None, None
        shared = self._probe.shared if self._probe else []
        if self._probe is not None:
            self._probe.shared = []
        self._shared = {step: shared, **dict([*self._shared.items()][:3])}
        table = host.numpy() if host is not None else np.empty((0, len(COLUMNS)))
        rows = [self._complete(row) for row in rows_of(rank(), table)]
        self._ring.append((step, rows))
        indices = {row.hash: row.index for row in rows}
        self._shared[step] = [
            dataclasses.replace(row, index=indices.get(row.hash, row.index))
            if row.rank == rank()
            else row
            for row in shared
        ]
        if self._file is not None:
            self._file.add(step, [_numbers(row) for row in rows])

    def _complete(self, row: Row) -> Row:
        """Adds the index of a row whose batch came without."""
        if row.index is not None:
            return row
        return dataclasses.replace(row, index=self.find_index(int(row.hash, 16)))

    # -- alerts --------------------------------------------------------------------------------

    def name_in(self, alert: Alert) -> Alert:
        """Returns the alert with the rows of its step, if they may be the cause; on rank 0.

        The rows of all ranks are asked for, and come with the next step's vector.
        """
        is_missing = alert.metric.startswith("grad/norm/") and alert.value == 0  # the model's doing
        rows = [] if is_missing else sort_rows(self._shared.get(alert.step, ()))
        if not rows or not alert.metric.startswith(_ABOUT_ROWS) or alert.severity == "info":
            return alert
        if self._events < _MOST_EVENTS:
            self._asked.setdefault(alert.step, []).append(alert.rule)
        return dataclasses.replace(
            alert,
            rows=tuple(row.to_dict() for row in rows[:_MOST_IN_ALERT]),
            message=f"{alert.message} Rows of the step, the most suspicious first: "
            f"{name_rows(rows)}.",
        )

    def _gather(self, step: int) -> dict[str, Any]:
        """Brings the rows of `step` together; every rank calls it at the same step."""
        own = self._guard.call("fingerprints of rows", lambda: self._pack(step), b"[]")
        found = gather_bytes(own, self._engine.device)
        rules = self._asked.pop(step, [])
        return self._describe(step, [json.loads(each) for each in found], rules)

    def _pack(self, step: int) -> bytes:
        most = max(1, _MOST_IN_EVENT // world_size())
        rows = sort_rows(row for at, held in self._ring if at == step for row in held)
        if self._file is not None:
            self._file.flush()
        return json.dumps([row.to_dict() for row in rows[:most]]).encode()

    def _describe(
        self, step: int, found: Sequence[Sequence[Mapping[str, Any]]], rules: Sequence[str]
    ) -> dict[str, Any]:
        self._events += 1
        rows = sort_rows(Row.from_dict(row) for each in found for row in each)
        return {
            "of_step": step,
            "rules": list(rules),
            "ranks": world_size(),
            "ranks_told": len(found),
            "rows": [row.to_dict() for row in rows],
        }

    def flush(self) -> None:
        """Writes what the ring has not written yet."""
        if self._file is not None:
            self._guarded(self._file.flush)

    def close(self) -> list[dict[str, Any]]:
        """Writes the ring; returns what no later step could gather: this rank's rows alone."""
        self.flush()
        left = []
        for step in list(self._asked):
            pack = partial(self._pack, step)
            own = json.loads(self._guard.call("fingerprints of rows", pack, b"[]"))
            left.append(self._describe(step, [own], self._asked.pop(step)))
        return left


def _numbers(row: Row) -> list[float | None]:
    return [row.micro_batch, row.index, int(row.hash, 16), row.length, row.trained, row.loss]
