"""Sequence parallelism for the user's own Trainer, by patches on instances that can be undone.

Gradients are right by construction. DeepSpeed and DDP know no sequence groups and average gradients
over the whole world in every ZeRO stage. Every rank's loss is the sum over its slice, divided by
the number of labels in the world and multiplied by the number of ranks. The average of the
gradients is thus the gradient of the token-weighted mean, as on one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import recursively_apply
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from ulysses_core.parallel.attention import NAME, register
from ulysses_core.parallel.batch import shard_batch
from ulysses_core.parallel.groups import SequenceGroup, make_groups
from ulysses_core.parallel.supported import choose_trainer_kernel, unwrap_model
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.integrations.callback import TrainerWatcher
from ulysses_monitor.records.batch_keys import IGNORE_INDEX
from ulysses_monitor.session.session import Session

__all__ = ["SP_METRICS", "SequenceParallelHandle", "sequence_parallel"]

SP_METRICS = ("sp/all_to_all_seconds/total", "sp/all_to_all_bytes/total")
"""Of a step: the mean over ranks of the time in exchanges, and the bytes that all ranks sent."""


class SequenceParallelHandle:
    """The changes that `sequence_parallel` made to a Trainer.

    Attributes:
        group: this rank's sequence group.
    """

    def __init__(self, group: SequenceGroup, undos: list[Undo]) -> None:
        self.group = group
        self._undos = undos

    def restore(self) -> None:
        """Undoes the changes to the Trainer, its accelerator and its model."""
        undo_all(self._undos)


def sequence_parallel(trainer: Trainer, size: int) -> SequenceParallelHandle:
    """Splits every row of `trainer`'s batches over `size` ranks; call it before `train()`.

    Works with Hugging Face's Trainer on causal language models and with any engine that averages
    gradients over all ranks (DDP, DeepSpeed ZeRO, FSDP2). Every rank must call it.

    Args:
        trainer: the Trainer; its model, accelerator and methods are patched on the instance.
        size: ranks that share a row; must divide the number of processes.

    Returns:
        A handle whose `restore()` undoes the changes.

    Raises:
        InputError: `size` does not divide the number of processes, or the model or a setting of
            the Trainer does not work on slices of rows.
    """
    group = make_groups(size)
    undos: list[Undo] = []
    if size == 1:
        return SequenceParallelHandle(group, undos)
    patches = _Patches(trainer, group, choose_trainer_kernel(trainer))
    undos += [_use_ulysses_attention(unwrap_model(trainer)), patches.remove_metrics]
    undos += [
        # The Trainer divides token counts and batch sizes by it. With `get_sp_size`, DeepSpeed's
        # own adapter would also multiply the dataloader's length.
        patch_method(trainer, "get_cp_size", lambda _: size),
        patch_method(trainer, "compute_loss", patches.compute_loss),
        patch_method(trainer, "prediction_step", patches.prediction_step),
        patch_method(trainer, "_get_dataloader", patches.get_dataloader),
        patch_method(trainer.accelerator, "gather_for_metrics", patches.gather_for_metrics),
        _use_patched_gather(trainer),
        _drop_eval_loaders(trainer),
    ]
    return SequenceParallelHandle(group, undos)


class _Patches:
    """Wrappers of the Trainer's methods."""

    def __init__(self, trainer: Trainer, group: SequenceGroup, kernel: str) -> None:
        self.trainer = trainer
        self.group = group
        self.kernel = kernel
        self._sessions: WeakKeyDictionary[Session, Undo] = WeakKeyDictionary()
        self._is_computing_loss = self._is_loss_only = False
        self.max_positions = getattr(unwrap_model(trainer).config, "max_position_embeddings", None)

    def compute_loss(
        self,
        original: Callable[..., Any],
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the loss of this rank's slices; its average over ranks is the batch's loss."""
        args, is_training = self.trainer.args, model.training
        self.group.meter.is_counting = is_training
        if is_training:
            self._add_metrics()
        else:
            # An evaluation averages the losses of batches, each the mean over its own tokens.
            num_items_in_batch = None
        sharded = shard_batch(
            inputs, self.group, kernel=self.kernel, max_positions=self.max_positions
        )
        is_world_count = num_items_in_batch is not None and args.average_tokens_across_devices
        if num_items_in_batch is None and "shift_labels" in sharded:
            num_items_in_batch = self._count_labels(sharded["shift_labels"])
        self._is_computing_loss = True
        try:
            result = original(
                model, sharded, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        finally:
            self._is_computing_loss = False
        loss, outputs = result if return_outputs else (result, None)
        if not is_world_count:
            # The count is the group's, so the loss needs the group's size as its factor. If the
            # Trainer took the count for the world's, it has already multiplied by the world's size.
            ranks = self.trainer.accelerator.num_processes
            loss = loss * self.group.size / (ranks if args.average_tokens_across_devices else 1)
        if not is_training:
            loss = self._sum_over_group(loss) / self.group.size
            if outputs is not None and not self._is_loss_only:
                length = sharded["ulysses"].layout.length
                outputs["logits"] = self._gather_rows(outputs["logits"], length)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        original: Callable[..., Any],
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Remembers whether the Trainer needs the logits of whole rows."""
        self._is_loss_only = prediction_loss_only
        try:
            return original(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._is_loss_only = False

    def _add_metrics(self) -> None:
        """Adds the cost of the exchange to the metrics of all monitors of the Trainer."""
        for callback in self.trainer.callback_handler.callbacks:
            session = callback.session if isinstance(callback, TrainerWatcher) else None
            if session is not None and session not in self._sessions:
                self._sessions[session] = session.sources.add(SP_METRICS, self._take_cost)

    def remove_metrics(self) -> None:
        """Removes the cost of the exchange from the metrics of all monitors."""
        while self._sessions:
            self._sessions.popitem()[1]()

    def _take_cost(self) -> tuple[float, float]:
        seconds, sent = self.group.meter.take()
        return seconds / self.trainer.accelerator.num_processes, sent

    def get_dataloader(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns a dataloader that gives all ranks of a sequence group the same rows."""
        loader = original(*args, **kwargs)
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(sampler, BatchSamplerShard):
            raise InputError(
                "sequence parallel: the dataloader is not sharded by batches; use a dataset that "
                "is not streamed, without accelerator_config.dispatch_batches"
            )
        if sampler.num_processes != self.trainer.accelerator.num_processes:
            raise InputError(
                "sequence parallel: the sampler distributes rows over ranks itself; use another "
                "train_sampling_strategy, such as random, sequential or group_by_length"
            )
        sampler.num_processes = self.group.data_size
        sampler.process_index = self.group.data_rank
        # A single group reads every batch, so a short last batch stays short, as on one process.
        sampler.even_batches = sampler.even_batches and self.group.data_size > 1
        return loader

    def gather_for_metrics(self, original: Callable[..., Any], data: Any, *_: Any) -> Any:  # noqa: ARG002
        """Gathers rows from one rank of each sequence group, without the last batch's filler rows.

        In `compute_loss` the data belongs to slices, and all ranks' data is gathered.
        """
        accelerator = self.trainer.accelerator
        if self._is_computing_loss:
            return accelerator.gather(data)
        state = accelerator.gradient_state

        def select_rows(gathered: Tensor) -> Tensor:
            ranks = accelerator.num_processes
            # [W * rows, ...] -> [W / n, rows, ...] -> [W / n * rows, ...]
            rows: Tensor = gathered.unflatten(0, (ranks, -1))[:: self.group.size].flatten(0, 1)
            has_filler = state.end_of_dataloader and state.remainder > 0
            return rows[: state.remainder] if has_filler else rows

        return recursively_apply(select_rows, accelerator.gather(data))

    def _count_labels(self, shifted: Tensor) -> Tensor:
        return self._sum_over_group(shifted.ne(IGNORE_INDEX).sum()).clamp(min=1)

    def _sum_over_group(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value, group=self.group.group)
        return value

    def _gather_rows(self, logits: Tensor, length: int) -> Tensor:
        """Gathers slices [B, s, V] into whole rows without padding [B, S', V]."""
        slices = [torch.empty_like(logits) for _ in range(self.group.size)]
        dist.all_gather(slices, logits.contiguous(), group=self.group.group)
        return torch.cat(slices, dim=1)[:, :length]


def _use_patched_gather(trainer: Trainer) -> Undo:
    """Replaces the Trainer's reference to the method; it takes a new one after each evaluation."""
    before = trainer.gather_function
    trainer.gather_function = trainer.accelerator.gather_for_metrics

    def undo() -> None:
        trainer.gather_function = before

    return undo


def _drop_eval_loaders(trainer: Trainer) -> Undo:
    """Drops the dataloaders that the Trainer caches with persistent workers.

    They were made for another distribution of rows.
    """

    def drop() -> None:
        vars(trainer).pop("_eval_dataloaders", None)

    drop()
    return drop


def _use_ulysses_attention(model: PreTrainedModel) -> Undo:
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return lambda: model.set_attn_implementation(before)
