"""Keeps the last lines of standard error with a run that fails."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ulysses_monitor.monitor import Monitor

__all__ = ["KeepStderr"]


class KeepStderr(TrainerCallback):
    """Lets the run that a training opens keep what the training writes to standard error.

    Args:
        monitor: the monitor of the Trainer, attached before.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers fixes the signature
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Starts keeping; the session stops it when it ends."""
        if self._monitor.session is not None:
            self._monitor.session.failure.log.follow(sys.stderr)
