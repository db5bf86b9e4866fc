"""The longest row that fits: this project's switches and DeepSpeed ALST's, on one model.

    python -m benchmarks.long_rows [--ranks 2] [--lengths 2048 4096 8192] [--room 256]

A training step of a Llama with sequence parallelism and gradient checkpointing: plainly, and with
the loss and the MLPs in tiles of the same size on both sides. Peak memory is of what is new in a
step, gradients included, as torch's dispatcher sees it (the allocator on a GPU). It grows by the
same amount for every token, so the longest row in a room of `--room` MB follows from the two
longest that were measured; beyond them it is an estimate.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import peak_growth
from benchmarks.sequence_parallel import _finish, _model, _registered_alst
from ulysses_core.memory.loss import chunk_loss
from ulysses_core.memory.mlp import tile_mlps
from ulysses_core.parallel import SequenceGroup, make_groups
from ulysses_core.parallel.attention import NAME, register
from ulysses_core.parallel.batch import shard_batch
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

TILE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--room", type=int, default=256, help="MB beside weights")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=4)
    arguments = parser.parse_args()
    measure.start(_rank, arguments.ranks, arguments)


def _rank(arguments: argparse.Namespace, device: torch.device) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend=dist.get_backend())
    group = make_groups(arguments.ranks)
    register()
    model = _model(arguments, max(arguments.lengths), device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ways = {
        "ours": _ours(model, group, tiles=False),
        "ALST": _alst(model, group, tiles=False),
        "ours, tiles": _ours(model, group, tiles=True),
        "ALST, tiles": _alst(model, group, tiles=True),
    }
    if dist.get_rank() == 0:
        tokens = ", ".join(f"{n:,}" for n in arguments.lengths)
        print(f"| way | peak MB at {tokens} tokens | KB a token | longest in {arguments.room} MB |")
        print("|---|---|---|---|")
    for name, step in ways.items():
        peaks = []
        for length in arguments.lengths:
            ids = torch.arange(length, device=device)[None] % 8192
            batch = shard_batch({"input_ids": ids, "labels": ids}, group)
            step(batch)  # workspaces and caches are there
            peaks.append(peak_growth(lambda s=step, b=batch: s(b), device) / 1e6)
        slope = (peaks[-1] - peaks[-2]) / (arguments.lengths[-1] - arguments.lengths[-2])
        longest = arguments.lengths[-1] + (arguments.room - peaks[-1]) / slope
        if dist.get_rank() == 0:
            shown = ", ".join(f"{peak:,.0f}" for peak in peaks)
            beyond = " (beyond what was run)" if longest > arguments.lengths[-1] else ""
            print(f"| {name} | {shown} | {1e3 * slope:.1f} | {longest:,.0f}{beyond} |", flush=True)


Step = Callable[[dict[str, Any]], None]


def _ours(model: Any, group: SequenceGroup, tiles: bool) -> Step:
    def step(batch: dict[str, Any]) -> None:
        undos = [chunk_loss(model, TILE, lambda: False), tile_mlps(model, TILE)] if tiles else []
        model.config._attn_implementation = NAME
        count = batch["input_ids"].shape[1] * group.size - 1
        loss = model(**batch, use_cache=False, num_items_in_batch=count).loss * group.size
        _finish(model, loss)
        model.config._attn_implementation = "sdpa"
        for undo in undos:
            undo()

    return step


_theirs: list[Any] = []


def _alst(model: Any, group: SequenceGroup, tiles: bool) -> Step:
    """Tiles as the docstrings of DeepSpeed's `TiledMLP` and `TiledFusedLogitsLoss` have them."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP
    from torch.distributed.nn.functional import all_gather
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not _theirs:
        _theirs.append(_registered_alst(model, group.size))
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain

    def mlp(self: Any, x: Tensor) -> Tensor:
        def forward(self: Any, x: Tensor) -> Tensor:
            out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return out

        params = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        done: Tensor = TiledMLP.apply(forward, self, x, math.ceil(x.shape[1] / TILE), params)
        return done

    def loss_of(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x).float(), y, ignore_index=IGNORE_INDEX, reduction="sum")

    def step(batch: dict[str, Any]) -> None:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _theirs[0]
        labels, inputs = batch["shift_labels"], {k: batch[k] for k in ("input_ids", "position_ids")}
        count = labels.ne(IGNORE_INDEX).sum()
        if tiles:
            for layer in model.model.layers:
                layer.mlp.forward = MethodType(mlp, layer.mlp)
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            shards = math.ceil(labels.shape[1] / TILE)
            weight = [model.lm_head.weight]
            summed = TiledFusedLogitsLoss.apply(
                loss_of, model.lm_head, hidden, labels, None, shards, weight, "sum"
            )
            loss = summed / count
        else:
            logits = model(**inputs, use_cache=False).logits
            loss = model.loss_function(
                logits=logits, labels=None, shift_labels=labels, vocab_size=logits.shape[-1]
            )
        losses, counts = all_gather(loss, group.group), all_gather(count, group.group)
        total = sum(one * n for one, n in zip(losses, counts, strict=True)) / sum(counts)
        _finish(model, total)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        for layer in model.model.layers:
            vars(layer.mlp).pop("forward", None)

    return step


if __name__ == "__main__":
    main()
