"""Watches a plain loop: hooks its steps and its rows, ends them, and leaves it when asked to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn

from ulysses_monitor.common.errors import TrainingStoppedError
from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.session.process_exit import Status
from ulysses_monitor.session.row_indices import HashedIndices
from ulysses_monitor.session.session import Session

__all__ = ["PlainLoop"]

logger = logging.getLogger(__name__)


class PlainLoop:
    """A loop of the user's own, while it runs.

    Args:
        session: records it.
        model: what the loop calls.
        loader: where it takes its batches from, if it says so.
        save: writes a checkpoint.

    Attributes:
        status: how the loop ended.
    """

    def __init__(
        self,
        session: Session,
        model: nn.Module,
        loader: Any = None,
        save: Callable[[int], object] | None = None,
    ) -> None:
        self._session, self._model, self._loader, self._save = session, model, loader, save
        self._undos: list[Undo] = []
        self.status: Status = "failed"

    def __enter__(self) -> Self:
        session = self._session
        session.hook_step(self._end_step, sees_clipping=True)
        self._undos.append(session.rows.hook(self._model))
        if self._loader is not None:
            indices = HashedIndices(self._loader, session.guard)
            session.rows.find_index = indices.find
            self._undos.append(indices.undo)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        """Notes how the loop ended; an error of ours that stops it ends here."""
        undo_all(self._undos)
        session = self._session
        if error is None:
            self.status = "finished"
        elif isinstance(error, TrainingStoppedError | KeyboardInterrupt):
            self.status = "stopped"
        else:
            session.failure.note(error)
        if isinstance(error, TrainingStoppedError) and session.stopped is not None:
            logger.warning("monitor: stopped at step %d: %s", session.step, error)
            return True
        return False  # also where somebody else stops it

    def _end_step(self) -> None:
        """Ends a step and does what was asked of the loop."""
        session = self._session
        session.step_ends()
        requests = session.take_requests()
        if "save" in requests and self._save is not None:
            self._save(session.step)
        if "stop" in requests:
            raise TrainingStoppedError(requests["stop"])
