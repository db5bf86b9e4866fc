"""A training step with DeepSpeed's ALST, written as its tutorial and docstrings have it.

Positions are given, and the ranks' losses are gathered and weighted by their tokens. Tiles are used
as in the docstrings of `TiledMLP` and `TiledFusedLogitsLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.sequence_study.training import end_step
from ulysses_core.parallel import SequenceGroup
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["alst_step"]

Batch = dict[str, Any]


def alst_step(
    model: Any, group: SequenceGroup, *, tile: int | None = None
) -> Callable[[Batch], None]:
    """Returns a function that trains `model` on a sliced batch.

    Args:
        model: a Llama.
        group: the ranks that share a row.
        tile: tokens of a tile of the loss and the MLPs; None for no tiles.
    """
    from torch.distributed.nn.functional import all_gather

    def step(batch: Batch) -> None:
        labels = batch["shift_labels"]
        with _use_attention(model, group.size), _tile_mlps(model, tile):
            loss = _loss(model, batch, tile)
            count = labels.ne(IGNORE_INDEX).sum()
            losses, counts = all_gather(loss, group.group), all_gather(count, group.group)
            weighted = (one * n for one, n in zip(losses, counts, strict=True))
            end_step(model, sum(weighted) / sum(counts))

    return step


def _loss(model: Any, batch: Batch, tile: int | None) -> Tensor:
    """The mean over this rank's tokens."""
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    labels = batch["shift_labels"]
    if tile is None:
        logits = model(**inputs, use_cache=False).logits
        loss: Tensor = model.loss_function(
            logits=logits, labels=None, shift_labels=labels, vocab_size=logits.shape[-1]
        )
        return loss
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def loss_of_tile(head: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), y, ignore_index=IGNORE_INDEX, reduction="sum")

    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    shards, weights = math.ceil(labels.shape[1] / tile), [model.lm_head.weight]
    summed: Tensor = TiledFusedLogitsLoss.apply(
        loss_of_tile, model.lm_head, hidden, labels, None, shards, weights, "sum"
    )
    return summed / labels.ne(IGNORE_INDEX).sum()


@contextmanager
def _tile_mlps(model: Any, tile: int | None) -> Iterator[None]:
    if tile is None:
        yield
        return
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out

    def tiled(self: Any, x: Tensor) -> Tensor:
        params = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        out: Tensor = TiledMLP.apply(forward, self, x, math.ceil(x.shape[1] / tile), params)
        return out

    for layer in model.model.layers:
        layer.mlp.forward = MethodType(tiled, layer.mlp)
    yield
    for layer in model.model.layers:
        vars(layer.mlp).pop("forward", None)


@contextmanager
def _use_attention(model: Any, size: int) -> Iterator[None]:
    """Puts ALST's attention in the place of transformers' SDPA."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _register_attention(model, size)
    yield
    ALL_ATTENTION_FUNCTIONS["sdpa"] = original


_registered: list[Any] = []


def _register_attention(model: Any, size: int) -> Any:
    """ALST's attention function; DeepSpeed can register it only once in a process."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not _registered:
        UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", size, 1)
        _registered.append(ALL_ATTENTION_FUNCTIONS["sdpa"])
    return _registered[0]
