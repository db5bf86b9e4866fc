"""What is patched on a Trainer and its accelerator for the duration of one training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.integrations.batches import attended_pairs, label_tokens, row_tokens
from ulysses_monitor.session.session import Session

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["BatchPatch", "end_when_it_fails", "observe_loss", "read_before_clipping"]

_PARTS = (
    *("get_batch_samples", "training_step", "_maybe_log_save_evaluate"),
    *("_run_epoch", "_finalize_training"),  # since transformers 5
)
"""Methods in which a Trainer spends a training, from its first batch to its last evaluation."""


class BatchPatch:
    """Counts the tokens of the micro-batches that a Trainer trains on.

    Args:
        trainer: the Trainer.
        session: observes the counts.
    """

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._trainer, self._session = trainer, session
        self._batches_are_prompts = False
        self._undos: list[Undo] = [
            patch_method(trainer, "get_batch_samples", self._get_batch_samples)
        ]

    def undo(self) -> None:
        """Puts the Trainer's methods back."""
        undo_all(self._undos)

    def _get_batch_samples(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._guarded(self._session.step_begins)
        result = original(*args, **kwargs)
        self._guarded(lambda: self._see(result[0]))
        return result

    def _see(self, batches: Sequence[Any]) -> None:
        if type(batches) not in (list, tuple):  # looking at an iterator's would use them up
            raise TypeError(f"get_batch_samples returned a {type(batches).__name__} of batches")
        for batch in batches:
            if isinstance(batch, Mapping):
                self._count(batch)
            elif not self._batches_are_prompts:  # GRPO and RLOO make batches of them just in time
                self._batches_are_prompts = True
                self._undos.append(
                    patch_method(self._trainer, "_prepare_inputs", self._prepare_inputs)
                )

    def _prepare_inputs(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)

        def count() -> None:
            if self._trainer.model.training:  # not an evaluation between steps
                self._count(batch)

        self._guarded(count)
        return batch

    def _guarded(self, function: Callable[[], None]) -> None:
        """Calls `function`; a batch that cannot be read costs the step's counts."""

        def call() -> bool:
            function()
            return True

        if not self._session.guarded("counting tokens", call, False):
            self._session.miss(counts=True)

    def _count(self, batch: Any) -> None:
        trainer = self._trainer
        # Ranks that share rows share their tokens. `get_sp_size` does not count: DeepSpeed's own
        # sequence parallelism has sliced the rows before they come here.
        # A Trainer of transformers 4 has neither method.
        sizes = (getattr(trainer, name, lambda: 1) for name in ("get_cp_size", "get_tp_size"))
        peers = math.prod(size() for size in sizes)
        shifted = getattr(trainer, "_loss_shifts_labels", True)
        labels = label_tokens(batch, shifted)
        self._session.inputs.see_batch(batch, shifted=shifted)
        self._session.observe(
            tokens=row_tokens(batch) / peers,
            loss_tokens=None if labels is None else labels / peers,
            attended=attended_pairs(batch) / peers,
        )


def observe_loss(session: Session) -> Callable[..., Any]:
    """Returns a wrapper of ``accelerator.backward`` that observes each micro-batch's loss."""

    def backward(original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        def observe() -> bool:
            session.observe(loss=loss)
            return True

        if not session.guarded("observing the loss", observe, False):
            session.miss(loss=True)
        return original(loss, *args, **kwargs)

    return backward


def end_when_it_fails(trainer: Trainer, end: Callable[[BaseException], None]) -> list[Undo]:
    """Calls `end` with what ends a training, as soon as a part of `trainer`'s loop raises it.

    No Trainer catches what its parts raise. Whoever calls ``train`` may catch it and train again,
    as accelerate does with a smaller batch when memory is out.

    Returns:
        Functions that put the Trainer's methods back.
    """

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            end(error)
            raise

    return [patch_method(trainer, part, call) for part in _PARTS if hasattr(trainer, part)]


def read_before_clipping(session: Session) -> Callable[..., Any]:
    """Returns a wrapper of ``accelerator.clip_grad_norm_`` that reads the gradients first."""

    def clip_grad_norm_(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session.gradients_ready()
        return original(*args, **kwargs)

    return clip_grad_norm_
