"""Sequence parallelism for the user's own Trainer, patched on instances and put back whole.

What is right by construction here: DeepSpeed and DDP average gradients over the whole world, in
every ZeRO stage, because they are given no sequence groups. Every rank's loss is the sum over its
slice divided by the label tokens of the whole world and multiplied by the number of ranks; so the
average of the gradients is the gradient of the token-weighted mean, as on one process.
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
from ulysses_core.parallel.cores import choose_core
from ulysses_core.parallel.groups import SequenceGroup, make_groups
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.integrations.callback import TrainerWatcher
from ulysses_monitor.records.batch_keys import IGNORE_INDEX
from ulysses_monitor.session.session import Session

__all__ = ["SP_METRICS", "SequenceParallelHandle", "sequence_parallel"]

SP_METRICS = ("sp/all_to_all_seconds/total", "sp/all_to_all_bytes/total")
"""Of a step: the mean over ranks of the time in exchanges, and what all ranks sent to others."""


class SequenceParallelHandle:
    """What `sequence_parallel` did to a Trainer.

    Attributes:
        group: this rank's sequence group.
    """

    def __init__(self, group: SequenceGroup, undos: list[Undo]) -> None:
        self.group = group
        self._undos = undos

    def restore(self) -> None:
        """Puts the Trainer, its accelerator and its model back as they were."""
        undo_all(self._undos)


def sequence_parallel(trainer: Trainer, size: int) -> SequenceParallelHandle:
    """Spreads every row of `trainer`'s batches over `size` ranks; call it before `train()`.

    Works with Hugging Face's Trainer on causal language models, on one process group of any
    engine that averages gradients over all ranks (DDP, DeepSpeed ZeRO). Every rank must call it.

    Args:
        trainer: the Trainer; its model, accelerator and methods are patched on the instance.
        size: ranks that share a row; must divide the number of processes.

    Returns:
        A handle whose `restore()` undoes it.

    Raises:
        InputError: the size does not divide the processes, or the model or a setting of the
            Trainer cannot be run on slices of rows.
    """
    group = make_groups(size)
    undos: list[Undo] = []
    if size == 1:
        return SequenceParallelHandle(group, undos)
    patches = _Patches(trainer, group, _checked_core(trainer))
    undos += [_use_ulysses_attention(_causal_lm(trainer)), patches.remove_exchange_cost]
    undos += [
        # What the Trainer divides token counts and batch sizes by. Not `get_sp_size`: it also
        # means that DeepSpeed's own adapter multiplies the dataloader's length.
        patch_method(trainer, "get_cp_size", lambda _: size),
        patch_method(trainer, "compute_loss", patches.compute_loss),
        patch_method(trainer, "prediction_step", patches.prediction_step),
        patch_method(trainer, "_get_dataloader", patches.get_dataloader),
        patch_method(trainer.accelerator, "gather_for_metrics", patches.gather_for_metrics),
        _use_patched_gather(trainer),
        _forget_eval_loaders(trainer),
    ]
    return SequenceParallelHandle(group, undos)


class _Patches:
    """The wrappers that go around the Trainer's methods."""

    def __init__(self, trainer: Trainer, group: SequenceGroup, core: str) -> None:
        self.trainer = trainer
        self.group = group
        self.core = core
        self._sessions: WeakKeyDictionary[Session, Undo] = WeakKeyDictionary()
        self._on_slices = self._loss_only = False
        self.max_positions = getattr(_causal_lm(trainer).config, "max_position_embeddings", None)

    def compute_loss(
        self,
        original: Callable[..., Any],
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of this rank's slices, scaled so that its average over ranks is the batch's."""
        args, training = self.trainer.args, model.training
        self.group.meter.running = training
        if training:
            self._add_exchange_cost()
        else:
            # An evaluation averages the losses of batches: each is the mean over its own tokens.
            num_items_in_batch = None
        sharded = shard_batch(inputs, self.group, core=self.core, max_positions=self.max_positions)
        counts_all = num_items_in_batch is not None and args.average_tokens_across_devices
        if num_items_in_batch is None and "shift_labels" in sharded:
            num_items_in_batch = self._label_tokens(sharded["shift_labels"])
        self._on_slices = True
        try:
            found = original(
                model, sharded, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        finally:
            self._on_slices = False
        loss, outputs = found if return_outputs else (found, None)
        if not counts_all:
            # The count is the group's. Where the Trainer has taken it for the whole world's, it has
            # multiplied by the world's size, and not by the number of ranks that share the rows.
            ranks = self.trainer.accelerator.num_processes
            loss = loss * self.group.size / (ranks if args.average_tokens_across_devices else 1)
        if not training:
            loss = self._sum(loss) / self.group.size
            if outputs is not None and not self._loss_only:
                length = sharded["ulysses"].rows.length
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
        """Notes whether the Trainer wants whole rows of logits."""
        self._loss_only = prediction_loss_only
        try:
            return original(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._loss_only = False

    def _add_exchange_cost(self) -> None:
        """Gives the cost of the exchange to every monitor of the Trainer, however it came there."""
        for callback in self.trainer.callback_handler.callbacks:
            session = callback.session if isinstance(callback, TrainerWatcher) else None
            if session is not None and session not in self._sessions:
                self._sessions[session] = session.add_source(SP_METRICS, self._exchange_cost)

    def remove_exchange_cost(self) -> None:
        """Takes the metrics back."""
        while self._sessions:
            self._sessions.popitem()[1]()

    def _exchange_cost(self) -> tuple[float, float]:
        seconds, sent = self.group.meter.take()
        return seconds / self.trainer.accelerator.num_processes, sent

    def get_dataloader(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A dataloader that gives all ranks of a sequence group the same rows."""
        loader = original(*args, **kwargs)
        shard = getattr(loader, "batch_sampler", None)
        if not isinstance(shard, BatchSamplerShard):
            raise InputError(
                "sequence parallel: the dataloader is not sharded by batches; streaming datasets "
                "and accelerator_config.dispatch_batches are not supported"
            )
        if shard.num_processes != self.trainer.accelerator.num_processes:
            raise InputError(
                "sequence parallel: the sampler shares rows out to ranks itself; use another "
                "train_sampling_strategy, such as random, sequential or group_by_length"
            )
        shard.num_processes = self.group.data_size
        shard.process_index = self.group.data_rank
        # One group reads every batch itself, so a short last batch stays short, as on one process.
        shard.even_batches = shard.even_batches and self.group.data_size > 1
        return loader

    def gather_for_metrics(self, original: Callable[..., Any], data: Any, *_: Any) -> Any:  # noqa: ARG002
        """Gathers rows once per sequence group, and drops those that only fill the last batch.

        Within `compute_loss` it is slices of rows that are summed up: all ranks' are wanted.
        """
        accelerator = self.trainer.accelerator
        if self._on_slices:
            return accelerator.gather(data)
        state = accelerator.gradient_state

        def first_of_each_group(gathered: Tensor) -> Tensor:
            ranks = accelerator.num_processes
            # [W * rows, ...] -> [W / n, rows, ...] -> [W / n * rows, ...]
            rows: Tensor = gathered.unflatten(0, (ranks, -1))[:: self.group.size].flatten(0, 1)
            drop = state.end_of_dataloader and state.remainder > 0
            return rows[: state.remainder] if drop else rows

        return recursively_apply(first_of_each_group, accelerator.gather(data))

    def _label_tokens(self, shifted: Tensor) -> Tensor:
        return self._sum(shifted.ne(IGNORE_INDEX).sum()).clamp(min=1)

    def _sum(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value, group=self.group.group)
        return value

    def _gather_rows(self, logits: Tensor, length: int) -> Tensor:
        """Slices [B, s, V] to whole rows without padding [B, S', V]."""
        slices = [torch.empty_like(logits) for _ in range(self.group.size)]
        dist.all_gather(slices, logits.contiguous(), group=self.group.group)
        return torch.cat(slices, dim=1)[:, :length]


def _causal_lm(trainer: Trainer) -> PreTrainedModel:
    """The transformers model inside the Trainer's model, without a PEFT wrapper around it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"sequence parallel: the model is a {type(model).__name__}; allowed is a "
            "transformers.PreTrainedModel, with or without PEFT adapters"
        )
    return model


def _checked_core(trainer: Trainer) -> str:
    """What attends; refuses what slices of rows cannot do."""
    args = trainer.args
    if args.label_smoothing_factor:
        raise InputError("sequence parallel: label_smoothing_factor must be 0")
    if not trainer.model_accepts_loss_kwargs:
        raise InputError("sequence parallel: the model's loss takes no num_items_in_batch")
    if trainer.compute_loss_func is not None:
        raise InputError("sequence parallel: compute_loss_func sees slices of rows; leave it out")
    model = _causal_lm(trainer)
    name, config = type(model).__name__, model.config
    if not model._supports_attention_backend:
        raise InputError(f"sequence parallel: {name} has no pluggable attention")
    if getattr(config, "output_router_logits", False):
        raise InputError(
            "sequence parallel: the router's balance loss would see slices of rows; "
            "set output_router_logits to false"
        )
    return choose_core(
        config._attn_implementation,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        device=args.device,
        half=args.bf16 or args.fp16 or model.dtype.itemsize == 2,
    )


def _use_patched_gather(trainer: Trainer) -> Undo:
    """The Trainer holds a reference to the method, and takes a new one after each evaluation."""
    before = trainer.gather_function
    trainer.gather_function = trainer.accelerator.gather_for_metrics

    def undo() -> None:
        trainer.gather_function = before

    return undo


def _forget_eval_loaders(trainer: Trainer) -> Undo:
    """The Trainer keeps them where workers persist; they were made for other shares of rows."""

    def forget() -> None:
        vars(trainer).pop("_eval_dataloaders", None)

    forget()
    return forget


def _use_ulysses_attention(model: PreTrainedModel) -> Undo:
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return lambda: model.set_attn_implementation(before)
