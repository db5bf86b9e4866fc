"""Sequence parallelism for the user's own Trainer, by patches on instances that can be undone.

The Trainer works on whole rows, as if the ranks of a sequence group were one process; `forward`
says how the model splits them and why the gradients are right. What is patched here gives the ranks
of a group the same rows, and counts rows and tokens once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from accelerate.utils import recursively_apply
from torch import Tensor
from transformers import Trainer

from ulysses_core.parallel.forward import ForwardOptions, split_rows_in_forward
from ulysses_core.parallel.groups import SequenceGroup, make_groups
from ulysses_core.parallel.preferences import check_pairs, find_pair_trainer, serve_log_probs
from ulysses_core.parallel.sampling import (
    check_sampling,
    samples_rows,
    select_groups,
    share_samples,
)
from ulysses_core.parallel.supported import (
    check_model,
    check_trainer,
    choose_trainer_kernel,
    unwrap_peft,
)
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.integrations.callback import TrainerWatcher
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


def sequence_parallel(
    trainer: Trainer, size: int, *, check_family: bool = True
) -> SequenceParallelHandle:
    """Splits every row of `trainer`'s batches over `size` ranks; call it before `train()`.

    Works with the Trainers of transformers and TRL whose models are causal language models or
    sequence classifiers (SFT, DPO, KTO, ORPO, CPO, Reward, GRPO, RLOO), and with any engine that
    averages gradients over all ranks (DDP, DeepSpeed ZeRO, FSDP2). Every rank must call it.

    Args:
        trainer: the Trainer; its models, accelerator and methods are patched on the instance.
        size: ranks that share a row; must divide the number of processes.
        check_family: whether to refuse models that were not shown to train rightly
            (docs/families.md); False takes the risk that one trains wrongly without a word.

    Returns:
        A handle whose `restore()` undoes the changes.

    Raises:
        InputError: `size` does not divide the number of processes, or the model or a setting of
            the Trainer does not work on slices of rows, or was not shown to.
    """
    group = make_groups(size)
    undos: list[Undo] = []
    if size == 1:
        return SequenceParallelHandle(group, undos)
    check_trainer(trainer)
    if samples_rows(trainer):
        check_sampling(trainer, group)
    is_of_pairs = find_pair_trainer(trainer) is not None
    if is_of_pairs:
        check_pairs(trainer)
    options = ForwardOptions(group=group, rows=check_model(trainer) if check_family else None)
    options.kernel = choose_trainer_kernel(trainer)
    patches = _Patches(trainer, group, options)
    try:
        names = ("model", "ref_model", "reward_model")
        models = [getattr(trainer, name, None) for name in names]
        undos.extend(_split_rows(trainer, each, options) for each in models if each is not None)
    except InputError:
        undo_all(undos)
        raise
    undos += [
        patches.remove_metrics,
        # As under tensor parallelism, several ranks have the same whole rows: the Trainer divides
        # token counts, batch sizes and the factor of the loss by it.
        patch_method(trainer, "get_tp_size", lambda _: size),
        patch_method(trainer, "prediction_step", patches.prediction_step),
        patch_method(trainer, "_get_num_items_in_batch", patches.count_labels),
        patch_method(trainer.accelerator, "prepare_data_loader", patches.prepare_data_loader),
        patch_method(trainer.accelerator, "gather_for_metrics", patches.gather_for_metrics),
        _use_patched_gather(trainer),
        _drop_eval_loaders(trainer),
    ]
    if samples_rows(trainer):
        undos.append(share_samples(trainer, group))
    if is_of_pairs:
        base = unwrap_peft(trainer.accelerator.unwrap_model(trainer.model))
        undos.append(serve_log_probs(trainer, base))
    return SequenceParallelHandle(group, undos)


def _split_rows(trainer: Trainer, wrapped: Any, options: ForwardOptions) -> Undo:
    wrapped = trainer.accelerator.unwrap_model(wrapped)
    return split_rows_in_forward(wrapped, unwrap_peft(wrapped), options)


class _Patches:
    """Wrappers of the methods of a Trainer and its accelerator."""

    def __init__(self, trainer: Trainer, group: SequenceGroup, options: ForwardOptions) -> None:
        self.trainer = trainer
        self.group = group
        self._options = options
        self._sessions: WeakKeyDictionary[Session, Undo] = WeakKeyDictionary()
        self._is_evaluating = False
        options.on_training = self._add_metrics

    def prediction_step(
        self,
        original: Callable[..., Any],
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Tells the model whether the Trainer needs the logits of whole rows."""
        self._is_evaluating, self._options.needs_logits = True, not prediction_loss_only
        try:
            return original(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._is_evaluating, self._options.needs_logits = False, True

    def count_labels(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the labels of the world's batch; None in an evaluation.

        An evaluation averages the losses of batches, each the mean over its own tokens, so that it
        does not depend on which batches several groups evaluate at once.
        """
        return None if self._is_evaluating else original(*args, **kwargs)

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

    def prepare_data_loader(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns a dataloader that gives all ranks of a sequence group the same rows."""
        loader = original(*args, **kwargs)
        sampler = getattr(loader, "batch_sampler", None)
        stream = getattr(loader, "dataset", None)
        if isinstance(stream, IterableDatasetShard):
            # All ranks read the whole stream, and keep the rows of their group.
            stream.num_processes = self.group.data_size
            stream.process_index = self.group.data_rank
            return loader
        if not isinstance(sampler, BatchSamplerShard):
            raise InputError(
                "sequence parallel: the dataloader is not sharded by batches; a dataset that is "
                "streamed needs accelerator_config.dispatch_batches=false and one shard"
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
        """Gathers from one rank of each sequence group, without the last batch's filler rows."""
        accelerator = self.trainer.accelerator
        state = accelerator.gradient_state

        def drop_filler(rows: Tensor) -> Tensor:
            has_filler = state.end_of_dataloader and state.remainder > 0
            return rows[: state.remainder] if has_filler else rows

        gathered = accelerator.gather(data)
        return recursively_apply(
            drop_filler, select_groups(gathered, accelerator.num_processes, self.group)
        )


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
