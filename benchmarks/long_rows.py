"""The longest row that fits: this project's memory switches and DeepSpeed ALST's, on one model.

    python -m benchmarks.long_rows [--ranks 2] [--lengths 2048 4096 8192] [--room 256]

Each way is a training step of a Llama with sequence parallelism and gradient checkpointing: once
without tiles, once with the loss and the MLPs in tiles, which have the same size in both projects.
Peak memory counts what is new in a step, gradients included, as torch's dispatcher sees it (on a
GPU, as the allocator does). It grows by the same amount for every token, so the longest row in a
room of `--room` MB follows from the two longest rows that were measured; beyond them it is an
estimate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measure
from benchmarks.measure import peak_growth
from benchmarks.sequence_study.alst import alst_step
from benchmarks.sequence_study.training import VOCABULARY, build_model, end_step
from ulysses_core.memory.loss import chunk_loss
from ulysses_core.memory.mlp import tile_mlps
from ulysses_core.parallel import SequenceGroup, make_groups
from ulysses_core.parallel.attention import NAME, register
from ulysses_core.parallel.batch import shard_batch

TILE = 512

Step = Callable[[dict[str, Any]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="two or more, ascending"
    )
    parser.add_argument("--room", type=int, default=256, help="MB beside the weights")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=4)
    arguments = parser.parse_args()
    if len(arguments.lengths) < 2:
        parser.error("--lengths: needs two or more")
    measure.start(_run_rank, arguments.ranks, arguments)


def _run_rank(arguments: argparse.Namespace, device: torch.device) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend=dist.get_backend())
    group = make_groups(arguments.ranks)
    register()
    model = build_model(arguments, max(arguments.lengths), device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ways = {
        "ours": _our_step(model, group, tiles=False),
        "ALST": alst_step(model, group),
        "ours, tiles": _our_step(model, group, tiles=True),
        "ALST, tiles": alst_step(model, group, tile=TILE),
    }
    if dist.get_rank() == 0:
        tokens = ", ".join(f"{n:,}" for n in arguments.lengths)
        print(f"| way | peak MB at {tokens} tokens | KB a token | longest in {arguments.room} MB |")
        print("|---|---|---|---|")
    for name, step in ways.items():
        peaks = [_peak_mb(step, length, group, device) for length in arguments.lengths]
        if dist.get_rank() == 0:
            _print_row(name, peaks, arguments)


def _peak_mb(step: Step, length: int, group: SequenceGroup, device: torch.device) -> float:
    ids = torch.arange(length, device=device)[None] % VOCABULARY
    batch = shard_batch({"input_ids": ids, "labels": ids}, group)
    step(batch)  # fills workspaces and caches
    return peak_growth(lambda: step(batch), device) / 1e6


def _print_row(name: str, peaks: list[float], arguments: argparse.Namespace) -> None:
    *_, before, last = arguments.lengths
    slope = (peaks[-1] - peaks[-2]) / (last - before)
    longest = last + (arguments.room - peaks[-1]) / slope
    shown = ", ".join(f"{peak:,.0f}" for peak in peaks)
    beyond = " (beyond what was run)" if longest > last else ""
    print(f"| {name} | {shown} | {1e3 * slope:.1f} | {longest:,.0f}{beyond} |", flush=True)


def _our_step(model: Any, group: SequenceGroup, *, tiles: bool) -> Step:
    def step(batch: dict[str, Any]) -> None:
        undos = [chunk_loss(model, TILE, lambda: False), tile_mlps(model, TILE)] if tiles else []
        model.config._attn_implementation = NAME
        count = batch["input_ids"].shape[1] * group.size - 1
        loss = model(**batch, use_cache=False, num_items_in_batch=count).loss * group.size
        end_step(model, loss)
        model.config._attn_implementation = "sdpa"
        for undo in undos:
            undo()

    return step


if __name__ == "__main__":
    main()
