"""The loss of a causal language model, a chunk of tokens at a time, without all logits.

Logits of a whole row are the largest tensor of a long row's step: S x V numbers, several times.
Here the output layer gives the summed loss of its tokens; a chunk's logits live until its gradients
with regard to hidden states and weight are known, which is at once.

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

_CHANGES_LOGITS = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
)
"""Entries of model configs by which a model changes logits after its output layer."""


def chunk_loss(model: Any, chunk: int, needs_logits: Callable[[], bool]) -> Undo:
    """Lets `model`, a transformers causal language model, compute its loss in chunks.

    Where it is called without labels it gives logits as ever.

    Args:
        model: the model, without wrappers.
        chunk: tokens at a time.
        needs_logits: whether evaluations need logits, which are then made.

    Raises:
        InputError: the model does more to its logits than its output layer, or that is none that
            is known.
    """
    head = model.get_output_embeddings()
    _check(model, head)
    loss = _Loss(model, head, chunk, needs_logits)
    before = vars(model).get("_loss_function")
    plain, model.loss_function = model.loss_function, loss.of_logits
    loss.plain = plain

    def undo_loss() -> None:
        del model._loss_function
        if before is not None:
            model.loss_function = before

    patches = [
        patch_method(model, "forward", loss.around_model),
        patch_method(head, "forward", loss.of_hidden),
    ]
    return lambda: undo_all([undo_loss, *patches])


def _check(model: Any, head: Any) -> None:
    name = type(model).__name__
    if type(head) is not nn.Linear:
        raise InputError(
            f"save_memory: loss_chunk needs a torch.nn.Linear as the output layer, and that of "
            f"{name} is {type(head).__name__}; leave it out"
        )
    for entry in _CHANGES_LOGITS:
        if getattr(model.config, entry, None) not in (None, 1.0):
            raise InputError(
                f"save_memory: loss_chunk does not know {entry} of {name}; leave it out"
            )


class _Loss:
    """Stands in for the output layer and for the loss function while a model has labels."""

    plain: Callable[..., Any]

    def __init__(
        self, model: Any, head: nn.Linear, chunk: int, needs_logits: Callable[[], bool]
    ) -> None:
        self._model, self._head, self._chunk = model, head, chunk
        self._needs_logits = needs_logits
        self._labels: Tensor | None = None

    def around_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keeps the labels of a call at hand."""
        shifted = kwargs.get("shift_labels")
        if shifted is None and kwargs.get("labels") is not None:
            shifted = F.pad(kwargs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        if self._model.training or not self._needs_logits():
            self._labels = shifted
        try:
            return original(*args, **kwargs)
        finally:
            self._labels = None

    def of_hidden(self, original: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The summed loss in place of logits."""
        if self._labels is None:
            logits: Tensor = original(hidden)
            return logits
        return _summed_loss(hidden, self._head.weight, self._head.bias, self._labels, self._chunk)

    def of_logits(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Divides what `of_hidden` has summed."""
        if self._labels is None:
            return self.plain(logits, *args, **kwargs)
        count = kwargs.get("num_items_in_batch")
        return logits / (self._labels.ne(IGNORE_INDEX).sum() if count is None else count)


def _summed_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int
) -> Tensor:
    """Sum of the tokens' losses, a float32 scalar or float64, from hidden states [B, s, E]."""
    labels = labels.to(hidden.device)
    seen = labels.ne(IGNORE_INDEX)
    summed: Tensor = _SummedLoss.apply(hidden[seen], weight, bias, labels[seen], chunk)  # type: ignore[no-untyped-call]
    return summed


class _SummedLoss(torch.autograd.Function):
    """Takes the gradients in the forward pass, as the loss is its own last operation."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int
    ) -> Tensor:
        given = {"hidden": hidden, "weight": weight}
        if bias is not None:
            given["bias"] = bias
        wanted = [name for name in given if ctx.needs_input_grad[_AT[name]]]
        total = torch.zeros((), dtype=_loss_dtype(hidden), device=hidden.device)
        sums = {n: torch.zeros_like(given[n], dtype=total.dtype) for n in wanted if n != "hidden"}
        states: list[Tensor] = []
        for part, own in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            with torch.enable_grad():
                leaves = {
                    name: (part if name == "hidden" else tensor).detach()
                    for name, tensor in given.items()
                }
                for name in wanted:
                    leaves[name].requires_grad_()
                logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
                loss = F.cross_entropy(logits.to(total.dtype), own, reduction="sum")
            total += loss.detach()
            found = torch.autograd.grad(loss, [leaves[n] for n in wanted]) if wanted else ()
            for name, gradient in zip(wanted, found, strict=True):
                if name == "hidden":
                    states.append(gradient)
                else:
                    sums[name] += gradient
        saved = {name: gradient.to(weight.dtype) for name, gradient in sums.items()}
        if "hidden" in wanted:
            saved["hidden"] = torch.cat(states)
        ctx.names = list(saved)
        ctx.save_for_backward(*saved.values())
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        scaled = {n: g * grads[0].to(g.dtype) for n, g in found.items()}
        return scaled.get("hidden"), scaled.get("weight"), scaled.get("bias"), None, None


_AT = {"hidden": 0, "weight": 1, "bias": 2}


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
