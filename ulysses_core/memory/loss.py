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

    def run_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the model and keeps its shifted labels meanwhile."""
        shifted = kwargs.get("shift_labels")
        if shifted is None and kwargs.get("labels") is not None:
            shifted = F.pad(kwargs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        if self._model.training or not self._needs_logits():
            self._labels = shifted
        try:
            return original(*args, **kwargs)
        finally:
            self._labels = None

    def run_head(self, original: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Returns the summed loss instead of logits."""
        if self._labels is None:
            logits: Tensor = original(hidden)
            return logits
        return _sum_loss(hidden, self._head.weight, self._head.bias, self._labels, self._chunk)

    def normalize(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Divides the sum from `run_head` by the number of labels."""
        if self._labels is None:
            return self.original(logits, *args, **kwargs)
        count = kwargs.get("num_items_in_batch")
        return logits / (self._labels.ne(IGNORE_INDEX).sum() if count is None else count)


def _sum_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int
) -> Tensor:
    """Returns the sum of the tokens' losses from hidden states [B, s, E].

    It is a scalar in float64 if `hidden` is, otherwise in float32.
    """
    labels = labels.to(hidden.device)
    is_labelled = labels.ne(IGNORE_INDEX)
    summed: Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        hidden[is_labelled], weight, bias, labels[is_labelled], chunk
    )
    return summed


class _SummedLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, up to the factor that the backward pass gets."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int
    ) -> Tensor:
        inputs = {"hidden": hidden, "weight": weight}
        if bias is not None:
            inputs["bias"] = bias
        trained = [name for name in inputs if ctx.needs_input_grad[_ARGUMENT_INDEX[name]]]
        total = torch.zeros((), dtype=_loss_dtype(hidden), device=hidden.device)
        sums = {n: torch.zeros_like(inputs[n], dtype=total.dtype) for n in trained if n != "hidden"}
        hidden_gradients: list[Tensor] = []
        for hidden_chunk, label_chunk in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            with torch.enable_grad():
                leaves = {
                    name: (hidden_chunk if name == "hidden" else tensor).detach()
                    for name, tensor in inputs.items()
                }
                for name in trained:
                    leaves[name].requires_grad_()
                logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
                loss = F.cross_entropy(logits.to(total.dtype), label_chunk, reduction="sum")
            total += loss.detach()
            gradients = torch.autograd.grad(loss, [leaves[n] for n in trained]) if trained else ()
            for name, gradient in zip(trained, gradients, strict=True):
                if name == "hidden":
                    hidden_gradients.append(gradient)
                else:
                    sums[name] += gradient
        saved = {name: gradient.to(weight.dtype) for name, gradient in sums.items()}
        if "hidden" in trained:
            saved["hidden"] = torch.cat(hidden_gradients)
        ctx.names = list(saved)
        ctx.save_for_backward(*saved.values())
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        scaled = {n: g * grads[0].to(g.dtype) for n, g in saved.items()}
        return scaled.get("hidden"), scaled.get("weight"), scaled.get("bias"), None, None


_ARGUMENT_INDEX = {"hidden": 0, "weight": 1, "bias": 2}


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
