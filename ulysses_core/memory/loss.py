"""Computes the loss of a causal language model a chunk of tokens at a time.

The logits of a whole row are the largest tensors of a step on long rows: several times S x V
numbers. Here the output layer returns the summed loss of its tokens instead. The logits of a chunk
are freed as soon as its gradients with respect to hidden states and weight are computed, which
happens in the forward pass.

Legend: B rows, s tokens of a slice, T tokens that have a label, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["chunk_loss"]

_LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
)
"""Entries of model configs that make a model change logits after its output layer."""


def chunk_loss(model: Any, chunk: int, needs_logits: Callable[[], bool]) -> Undo:
    """Makes `model`, a transformers causal language model, compute its loss in chunks.

    Without labels the model returns logits as before.

    Args:
        model: the model, without wrappers.
        chunk: tokens per chunk.
        needs_logits: tells whether an evaluation needs logits; the loss is then not chunked.

    Raises:
        InputError: the output layer is not a `torch.nn.Linear`, or the model changes logits after
            it.
    """
    head = model.get_output_embeddings()
    _check_output_layer(model, head)
    loss = _ChunkedLoss(model, head, chunk, needs_logits)
    before = vars(model).get("_loss_function")
    loss.original, model.loss_function = model.loss_function, loss.normalize

    def undo_loss() -> None:
        del model._loss_function
        if before is not None:
            model.loss_function = before

    patches = [
        patch_method(model, "forward", loss.run_model),
        patch_method(head, "forward", loss.run_head),
    ]
    return lambda: undo_all([undo_loss, *patches])


def _check_output_layer(model: Any, head: Any) -> None:
    name = type(model).__name__
    if type(head) is not nn.Linear:
        raise InputError(
            f"save_memory: the output layer of {name} is {type(head).__name__}, and loss_chunk "
            "needs torch.nn.Linear; remove loss_chunk"
        )
    for entry in _LOGIT_SETTINGS:
        if getattr(model.config, entry, None) not in (None, 1.0):
            raise InputError(
                f"save_memory: loss_chunk does not support {entry} of {name}; remove loss_chunk"
            )


class _ChunkedLoss:
    """Replaces the output layer and the loss function in calls with labels.

    Attributes:
        original: the model's own loss function.
    """

    original: Callable[..., Any]

    def __init__(
        self, model: Any, head: nn.Linear, chunk: int, needs_logits: Callable[[], bool]
    ) -> None:
        self._model, self._head, self._chunk = model, head, chunk
        self._needs_logits = needs_logits
        self._labels: Tensor | None = None
        self._count: Any = None

    def run_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the model and keeps its shifted labels meanwhile."""
        shifted = kwargs.get("shift_labels")
        if shifted is None and kwargs.get("labels") is not None:
            shifted = F.pad(kwargs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        if self._model.training or not self._needs_logits():
            self._labels, self._count = shifted, kwargs.get("num_items_in_batch")
        try:
            return original(*args, **kwargs)
        finally:
            self._labels = self._count = None

    def run_head(self, original: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Returns the summed loss instead of logits."""
        if self._labels is None:
            logits: Tensor = original(hidden)
            return logits
        head = self._head
        return _sum_loss(hidden, head.weight, head.bias, self._labels, self._chunk, self._count)

    def normalize(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Divides the sum from `run_head` by the number of labels."""
        if self._labels is None:
            return self.original(logits, *args, **kwargs)
        count = kwargs.get("num_items_in_batch")
        return logits / (self._labels.ne(IGNORE_INDEX).sum() if count is None else count)


def _sum_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk: int,
    count: Any = None,
) -> Tensor:
    """Returns the sum of the tokens' losses from hidden states [B, s, E].

    It is a scalar in float64 if `hidden` is, otherwise in float32. `count` is what the caller
    divides it by, an integer or a tensor; None for the number of labels.
    """
    labels = labels.to(hidden.device)
    is_labelled = labels.ne(IGNORE_INDEX)
    if count is None:
        count = is_labelled.sum()
    divisor = torch.as_tensor(count, dtype=_loss_dtype(hidden), device=hidden.device)
    summed: Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        hidden[is_labelled], weight, bias, labels[is_labelled], chunk, divisor
    )
    return summed


class _SummedLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, up to the factor that the backward pass gets.

    That factor is 1/N times a loss scale, and must not be rounded to half precision: 1/848 in
    bfloat16 is 0.28 % too large, and so would be every gradient. Nor may it multiply numbers in
    half precision unless it is a power of two: times 1/511 all of them are rounded down. So the
    mantissa of N divides the gradient of the logits in float32, and the exponent is left.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        divisor: Tensor,
    ) -> Tensor:
        mantissa = torch.frexp(divisor.clamp(min=1)).mantissa
        layer = _OutputLayer(hidden, weight, bias, mantissa, ctx.needs_input_grad[:3])
        for hidden_chunk, label_chunk in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            layer.add_chunk(hidden_chunk, label_chunk)
        ctx.save_for_backward(mantissa, *layer.gradients())
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        ctx.piece = chunk * weight.shape[0]
        return layer.total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mantissa, *gradients = ctx.saved_tensors
        factor = grads[0] * mantissa
        scaled = [
            None if gradient is None else _scale(gradient, factor, dtype, ctx.piece)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


class _OutputLayer:
    """Sums over chunks the loss and its gradients, which it divides by `divisor`.

    Attributes:
        total: the summed loss, a scalar in float32 or float64.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        divisor: Tensor,
        is_trained: tuple[bool, ...],
    ) -> None:
        dtype = _compute_dtype(hidden)  # autocast would convert the weight in every chunk
        self._weight = weight.detach().to(dtype)
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._divisor, self._dtype = divisor, hidden.dtype
        self.total = torch.zeros_like(divisor)
        self._of_hidden: list[Tensor] | None = [] if is_trained[0] else None
        self._of_weight, self._of_bias = (
            torch.zeros_like(each, dtype=divisor.dtype) if each is not None and trains else None
            for each, trains in zip((weight, bias), is_trained[1:], strict=True)
        )

    def add_chunk(self, hidden: Tensor, labels: Tensor) -> None:
        """Adds the loss and the gradients of hidden states [t, E] with labels [t]."""
        hidden, at = hidden.to(self._weight.dtype), labels[:, None]
        logits = F.linear(hidden, self._weight, self._bias).to(self.total.dtype)  # [t, V]
        normalizer = logits.logsumexp(-1, keepdim=True)
        self.total += (normalizer - logits.gather(-1, at)).sum()
        gradient = logits.sub_(normalizer).exp_()  # of the logits: softmax minus one-hot
        gradient.scatter_add_(-1, at, -torch.ones_like(normalizer)).div_(self._divisor)
        self._add_gradients(gradient, hidden, labels)

    def _add_gradients(self, gradient: Tensor, hidden: Tensor, labels: Tensor) -> None:
        """Adds the gradients that follow from `gradient` [t, V] of the logits.

        The entry of the label is the largest of its row, and about the same for all unlikely
        tokens, so rounding it to half precision scales every gradient. What rounding takes from it
        is added back.
        """
        rounded = gradient.to(hidden.dtype)
        lost = (gradient - rounded).gather(-1, labels[:, None])  # [t, 1]
        if self._of_bias is not None:
            self._of_bias += gradient.sum(0)
        if self._of_hidden is not None:  # addmm adds in float32 and rounds once
            added = (lost * self._weight[labels]).to(hidden.dtype)
            self._of_hidden.append(added.addmm_(rounded, self._weight).to(self._dtype))
        if self._of_weight is not None:
            added = torch.zeros_like(self._weight)
            added.index_add_(0, labels, (lost * hidden).to(hidden.dtype))
            self._of_weight += added.addmm_(rounded.t(), hidden)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden states, weight and bias; None if one is not trained."""
        hidden = None if self._of_hidden is None else torch.cat(self._of_hidden)
        return hidden, self._of_weight, self._of_bias


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype, piece: int) -> Tensor:
    """Returns `gradient` times `factor` in `dtype`; other new tensors hold about `piece` numbers.

    On a GPU torch would round `factor` to the dtype of `gradient`.
    """
    scaled = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, piece // max(1, gradient[:1].numel()))
    for source, target in zip(gradient.split(rows), scaled.split(rows), strict=True):
        target.copy_(source.to(factor.dtype) * factor)
    return scaled


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the dtype in which a linear layer computes, which autocast may set."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
