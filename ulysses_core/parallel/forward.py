"""Sequence parallelism at the model's forward: whole rows in, whole per-token results out.

A Trainer, whatever its loss, calls its model with whole rows and gets whole results. Inside, hooks
cut the rows into slices before the model runs, and gather the scalars of each token after it. They
never gather logits, except in an evaluation that asks for them.

Every rank of a sequence group thus computes the same loss from the same whole rows. Its gradient
flows back only into the rank's own slice, times the number of ranks n. An engine averages gradients
over the whole world, so it gets the gradient of the groups' mean loss, in every ZeRO stage.

Legend: B rows, S tokens of a whole row (padded to a multiple of n), s = S / n, n ranks, L labels of
a classification head, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from ulysses_core.parallel.attention import NAME, register
from ulysses_core.parallel.batch import RowContext, shard_batch
from ulysses_core.parallel.gather import gather_tokens, sum_over_group
from ulysses_core.parallel.groups import SequenceGroup
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["ForwardOptions", "split_rows_in_forward"]

_FUSED = "fused_lm_head"
"""Argument with which TRL's trainers ask for log-probabilities instead of logits."""

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "token_values")
"""Fields [B, s] of the output that TRL's fused head and our value head return."""


@dataclass(kw_only=True)
class ForwardOptions:
    """What the hooks need to know, and the Trainer may change.

    Attributes:
        group: the sequence group.
        kernel: the attention kernel, a key of `kernels.KERNELS`.
        needs_logits: whether an evaluation needs the logits of whole rows.
        on_training: called before each forward pass that is trained on.
    """

    group: SequenceGroup
    kernel: str = "sdpa"
    needs_logits: bool = True
    on_training: Callable[[], None] = lambda: None


def split_rows_in_forward(wrapped: nn.Module, model: Any, options: ForwardOptions) -> Undo:
    """Makes `wrapped` split the rows it is called with over the ranks of a sequence group.

    Args:
        wrapped: what the Trainer calls: `model`, or a PEFT model around it.
        model: a causal language model or sequence classifier of transformers.
        options: the group, the kernel and what the Trainer needs.

    Returns:
        A function that undoes it.

    Raises:
        InputError: the model is of another kind.
    """
    hooks = _Hooks(model, options)
    undos = [_use_ulysses_attention(model)]
    if isinstance(model, GenericForSequenceClassification):
        head: Any = model.score
        undos += [_before(model.base_model, hooks.enter_backbone), _after(head, hooks.leave_head)]
    elif isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        undos += [_before(wrapped, hooks.enter), _after(wrapped, hooks.leave)]
        undos.append(patch_method(model, "generate", hooks.generate))
    else:
        undo_all(undos)
        raise InputError(
            f"sequence parallel: the model is a {type(model).__name__}; expected a causal language "
            "model or a sequence classifier of transformers"
        )
    return lambda: undo_all(undos)


def _before(module: nn.Module, hook: Callable[..., Any]) -> Undo:
    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _after(module: nn.Module, hook: Callable[..., Any]) -> Undo:
    return module.register_forward_hook(hook, with_kwargs=True).remove


def _use_ulysses_attention(model: PreTrainedModel) -> Undo:
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return lambda: model.set_attn_implementation(before)


class _Hooks:
    """Hooks before and after the forward pass of one model."""

    def __init__(self, model: Any, options: ForwardOptions) -> None:
        self._model, self._options = model, options
        self._attention = model.config._attn_implementation
        self._max_positions = getattr(model.config, "max_position_embeddings", None)
        self._is_generating = False
        self._checked: set[bool] = set()
        self._context: RowContext | None = None

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replaces whole rows by this rank's slices, in a causal language model."""
        if self._is_generating:
            return None
        sharded = self._shard(module, args, kwargs)
        if "labels" in sharded and not kwargs.get(_FUSED):
            self._check_loss()
            if sharded.get("num_items_in_batch") is None:
                sharded["num_items_in_batch"] = self._count_labels(sharded["labels"])
        return (), sharded

    def leave(
        self,
        module: nn.Module,
        args: tuple[Any, ...],  # noqa: ARG002 - torch fixes the signatures of hooks
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Replaces the results of slices by those of whole rows."""
        context: RowContext | None = kwargs.get("ulysses")
        if context is None:
            return output
        if kwargs.get(_FUSED):
            return self._gather_fused(output, kwargs, context)
        return self._gather_loss_and_logits(module, output, context)

    def enter_backbone(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replaces whole rows by this rank's slices, below a classification head."""
        sharded = self._shard(module, args, kwargs)
        self._context = sharded["ulysses"]
        return (), sharded

    def leave_head(self, *arguments: Any) -> Tensor:
        """Gathers the scores of slices [B, s, L], so that the model finds each row's last token."""
        scores: Tensor = arguments[-1]  # after the module and the arguments of its call
        context, self._context = self._context, None
        if context is None:
            return scores
        return gather_tokens(scores, context.group)[:, : context.layout.length]

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generates on this rank alone, with the model's own attention."""
        self._is_generating = True
        self._model.set_attn_implementation(self._attention)
        try:
            return original(*args, **kwargs)
        finally:
            self._model.set_attn_implementation(NAME)
            self._is_generating = False

    def _shard(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        options = self._options
        is_trained = module.training and torch.is_grad_enabled()
        options.group.meter.is_counting = is_trained
        if is_trained:
            options.on_training()
        whole = {"input_ids": args[0], **kwargs} if args else kwargs
        given = {key: value for key, value in whole.items() if value is not None}
        if is_trained not in self._checked:
            self._checked.add(is_trained)
            _check_same_rows(given.get("input_ids"), options.group)
        return shard_batch(
            given, options.group, kernel=options.kernel, max_positions=self._max_positions
        )

    def _check_loss(self) -> None:
        if not _takes_any_keyword(type(self._model).forward):
            raise InputError(
                f"sequence parallel: the loss of {type(self._model).__name__} does not accept "
                "num_items_in_batch; use a model whose forward accepts it"
            )

    def _count_labels(self, shifted: Tensor) -> Tensor:
        count = shifted.ne(IGNORE_INDEX).sum()
        dist.all_reduce(count, group=self._options.group.group)
        return count.clamp(min=1)

    def _gather_fused(self, output: Any, kwargs: dict[str, Any], context: RowContext) -> Any:
        """Gathers the per-token fields of TRL's fused head in one collective."""
        if output.aux_loss is not None:
            raise InputError(
                "sequence parallel: output_router_logits is true, but the router's balance loss "
                "would see slices of rows; set router_aux_loss_coef of the trainer to 0"
            )
        slices = {name: getattr(output, name, None) for name in _PER_TOKEN}
        given = {name: field for name, field in slices.items() if field is not None}
        floats = [field.dtype for field in given.values() if field.is_floating_point()]
        dtype = reduce(torch.promote_types, floats)
        stacked = torch.stack([field.to(dtype) for field in given.values()], dim=-1)
        mask = output.label_mask.to(dtype).unsqueeze(-1)
        rows = gather_tokens(torch.cat([stacked, mask], dim=-1), context.group)
        # The fused head gives S - 1 results for a row: none predicts the first token.
        rows = rows[:, : context.layout.length - (not context.has_shifted_labels)]
        *fields, mask = rows.unbind(-1)
        whole = {n: f.to(given[n].dtype) for n, f in zip(given, fields, strict=True)}
        count = kwargs.get("num_items_in_batch")
        whole["loss"] = -whole["log_probs"].sum() / (
            mask.sum().clamp(1) if count is None else count
        )
        return type(output)(**whole, label_mask=mask.ne(0))

    def _gather_loss_and_logits(self, module: nn.Module, output: Any, context: RowContext) -> Any:
        whole = {}
        if output.get("loss") is not None:
            whole["loss"] = sum_over_group(output["loss"], context.group)
        if "loss" not in whole and torch.is_grad_enabled():
            raise InputError(
                "sequence parallel: the trainer asks for the logits of whole rows in training, "
                "which no rank holds; use a trainer of transformers or TRL that passes labels"
            )
        if not module.training and self._options.needs_logits:
            whole["logits"] = gather_tokens(output["logits"], context.group)[
                :, : context.layout.length
            ]
        return type(output)(**whole)


def _check_same_rows(ids: Any, group: SequenceGroup) -> None:
    """Refuses a batch of which the ranks of a group hold different rows; every rank calls it.

    It is called for the first batch of a training and of an evaluation, which shows whether rows
    are distributed as they must be.
    """
    marks = [0, 0, 0]
    if isinstance(ids, Tensor):
        places = torch.arange(1, ids.numel() + 1, device=ids.device)
        marks = [*ids.shape[:2], int((ids.flatten() * places).sum())]
    device = ids.device if isinstance(ids, Tensor) else None
    own = torch.tensor(marks, device=device)
    others = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(others, own, group=group.group)
    if any(not torch.equal(own, other) for other in others):
        raise InputError(
            "sequence parallel: the ranks of a group got different rows; use a trainer that takes "
            "its rows from a dataset, or one of TRL's for GRPO and RLOO, and call "
            "sequence_parallel before a dataloader is made"
        )


def _takes_any_keyword(function: Callable[..., Any]) -> bool:
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
