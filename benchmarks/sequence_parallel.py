"""Ulysses sequence parallelism beside others, in one run: the exchange, a layer, a training step.

    python -m benchmarks.sequence_parallel [--what exchange layer step] [--ranks 2]
        [--lengths 1024 2048 ...] [--rounds 7] [--heads 16] [--key-heads 4]

Every way works on the same rows. The ways take turns in an order that changes from round to round,
and all ranks begin together. The forward and backward pass is timed, and the slowest rank counts.

- ours: this project;
- ALST: DeepSpeed's `UlyssesSPAttentionHF`, registered with transformers;
- DistributedAttention: DeepSpeed's older layer (exchange and layer only);
- one process: whole rows on one rank with the threads of all ranks (layer and step only).

`exchange` has a core that computes nothing, `layer` has torch's SDPA, and `step` trains a Llama of
4 layers: loss, backward pass, averaged gradients and SGD. Peak memory is the most that new tensors
take at a time during the call, as torch's dispatcher sees them; on a GPU, as the allocator does.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measure
from benchmarks.measure import Collectives, peak_growth, seconds_of
from benchmarks.sequence_study.alst import alst_step
from benchmarks.sequence_study.attention import (
    ALST,
    OURS,
    Through,
    attention_ways,
    make_inputs,
    sdpa,
)
from benchmarks.sequence_study.training import VOCABULARY, build_model, end_step
from benchmarks.tables import spread
from ulysses_core.parallel import SequenceGroup, make_groups
from ulysses_core.parallel.attention import NAME, register
from ulysses_core.parallel.batch import shard_batch

ONE = "one process"

Ways = dict[str, Callable[[], None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--what", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--ranks", type=int, default=2)
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=4)
    arguments = parser.parse_args()
    measure.start(_run_rank, arguments.ranks, arguments)


def _run_rank(arguments: argparse.Namespace, device: torch.device) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend=dist.get_backend())
    group = make_groups(arguments.ranks)
    for what in arguments.what:
        if dist.get_rank() == 0:
            _print_head(what, arguments, device)
        for length in arguments.lengths:
            _compare(length, MAKERS[what](arguments, length, group, device), arguments, device)


def _print_head(what: str, arguments: argparse.Namespace, device: torch.device) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"\n## {what}: {arguments.ranks} ranks x {torch.get_num_threads()} threads, ", end="")
    print(f"{where}, {arguments.heads} query and {arguments.key_heads} key heads\n")
    print("| tokens a row | way | ms | times ours | collectives | MB sent | peak MB |")
    print("|---|---|---|---|---|---|---|")


def _compare(length: int, ways: Ways, arguments: argparse.Namespace, device: torch.device) -> None:
    facts = {}
    for name, call in ways.items():
        call()  # warms up
        with Collectives() as seen:
            call()
        facts[name] = (seen.count, seen.bytes / 1e6, peak_growth(call, device) / 1e6)
    seconds: dict[str, list[float]] = defaultdict(list)
    names = list(ways)
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(seconds_of(ways[name], device))
    if dist.get_rank():
        return
    for name, taken in seconds.items():
        ratios = [t / o for t, o in zip(taken, seconds[OURS], strict=True)]
        count, sent, peak = facts[name]
        print(
            f"| {length:,} | {name} | {spread((1e3 * t for t in taken), ',.1f')} "
            f"| {spread(ratios)} | {count} | {sent:,.1f} | {peak:,.0f} |",
            flush=True,
        )


def _exchange_ways(arguments: Any, length: int, group: SequenceGroup, device: torch.device) -> Ways:
    return attention_ways(arguments, length, group, device, Through.apply)


def _layer_ways(arguments: Any, length: int, group: SequenceGroup, device: torch.device) -> Ways:
    ways = attention_ways(arguments, length, group, device, sdpa)
    whole = make_inputs(arguments, length, device)

    def one() -> None:
        q, k, v = (t.transpose(1, 2) for t in whole)
        measure.backward(sdpa(q, k, v).transpose(1, 2).contiguous())

    return ways | {ONE: measure.on_first_rank(one, group.size)}


def _step_ways(arguments: Any, length: int, group: SequenceGroup, device: torch.device) -> Ways:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (1, length), generator=generator).to(device)
    register()
    model = build_model(arguments, length, device)
    batch = shard_batch({"input_ids": ids, "labels": ids}, group)
    train_alst = alst_step(model, group)

    def ours() -> None:
        model.config._attn_implementation = NAME
        loss = model(**batch, use_cache=False, num_items_in_batch=length - 1).loss * group.size
        model.config._attn_implementation = "sdpa"
        end_step(model, loss)

    def one() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        end_step(model, loss, average=False)

    return {
        OURS: ours,
        ALST: lambda: train_alst(batch),
        ONE: measure.on_first_rank(one, group.size),
    }


MAKERS = {"exchange": _exchange_ways, "layer": _layer_ways, "step": _step_ways}


if __name__ == "__main__":
    main()
