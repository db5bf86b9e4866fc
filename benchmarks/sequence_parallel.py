"""Ulysses sequence parallelism beside others, in one run: the exchange, a layer, a training step.

    python -m benchmarks.sequence_parallel [--what exchange layer step] [--ranks 2]
        [--lengths 1024 2048 ...] [--rounds 7] [--heads 16] [--key-heads 4]

Every way works on the same rows, one after the other, the order changing from round to round, and
all ranks begin together. Forward and backward are timed, and the slowest rank counts.

- ours: this project;
- ALST: DeepSpeed's `UlyssesSPAttentionHF`, as it is given to transformers;
- DistributedAttention: DeepSpeed's older layer (exchange and layer only);
- one process: the whole row on one rank with the threads of all (layer and step only).

`exchange` has a core that computes nothing, `layer` torch's SDPA, `step` is a Llama of 4 layers
with loss, backward, averaged gradients and SGD. Peak memory is what tensors take that are new in
the call, as seen by torch's dispatcher, at its highest; on a GPU what the allocator gave.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import Collectives, peak_growth, seconds_of
from ulysses_core.parallel import SequenceGroup, make_groups
from ulysses_core.parallel.attention import NAME, register
from ulysses_core.parallel.batch import shard_batch
from ulysses_core.parallel.exchange import gather_heads, plan_heads, scatter_heads
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

OURS, ALST, OLD, ONE = "ours", "ALST", "DistributedAttention", "one process"
WIDTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--what", nargs="+", default=["exchange", "layer", "step"])
    parser.add_argument("--ranks", type=int, default=2)
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=4)
    arguments = parser.parse_args()
    measure.start(_rank, arguments.ranks, arguments)


def _rank(arguments: argparse.Namespace, device: torch.device) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend=dist.get_backend())
    group = make_groups(arguments.ranks)
    for what in arguments.what:
        if dist.get_rank() == 0:
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
            print(
                f"\n## {what}: {arguments.ranks} ranks x {torch.get_num_threads()} threads, ",
                end="",
            )
            print(f"{where}, {arguments.heads} query and {arguments.key_heads} key heads\n")
            print("| tokens a row | way | ms | times ours | collectives | MB sent | peak MB |")
            print("|---|---|---|---|---|---|---|")
        for length in arguments.lengths:
            ways = {"exchange": _exchanges, "layer": _layers, "step": _steps}[what](
                arguments, length, group, device
            )
            _compare(length, ways, arguments, device)


def _compare(
    length: int, ways: dict[str, Callable[[], None]], arguments: Any, device: torch.device
) -> None:
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
        middle = statistics.median(taken)
        print(
            f"| {length:,} | {name} | {1e3 * middle:,.1f} [{1e3 * min(taken):,.1f}, "
            f"{1e3 * max(taken):,.1f}] | {statistics.median(ratios):.2f} [{min(ratios):.2f}, "
            f"{max(ratios):.2f}] | {count} | {sent:,.1f} | {peak:,.0f} |",
            flush=True,
        )


# -- the exchange alone, and a layer ------------------------------------------------------------


class _Through(torch.autograd.Function):
    """A core that computes nothing, and whose gradient reaches q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        k, v = ctx.saved_tensors
        return grad, torch.empty_like(k), torch.empty_like(v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _exchanges(
    arguments: Any, length: int, group: SequenceGroup, device: torch.device
) -> dict[str, Callable[[], None]]:
    return _attention_ways(arguments, length, group, device, _Through.apply)


def _layers(
    arguments: Any, length: int, group: SequenceGroup, device: torch.device
) -> dict[str, Callable[[], None]]:
    ways = _attention_ways(arguments, length, group, device, _sdpa)
    whole = _inputs(arguments, length, device)

    def one() -> None:
        q, k, v = (t.transpose(1, 2) for t in whole)
        measure.backward(_sdpa(q, k, v).transpose(1, 2).contiguous())

    return ways | {ONE: measure.on_first_rank(one, group.size)}


def _attention_ways(
    arguments: Any, length: int, group: SequenceGroup, device: torch.device, core: Any
) -> dict[str, Callable[[], None]]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from deepspeed.sequence.layer import DistributedAttention

    heads, key_heads = arguments.heads, arguments.key_heads
    leaves = _inputs(arguments, length // group.size, device)  # [1, s, H, D], as projections give
    plan = plan_heads(heads, key_heads, group.size)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    start = group.rank * length // group.size
    positions = torch.arange(start, start + length // group.size, device=device)[None]

    def alst_core(_: Any, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> Any:
        return core(q, k, v).transpose(1, 2).contiguous(), None

    def old_core(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        found: Tensor = core(*(t.transpose(1, 2) for t in (q, k, v)))
        return found.transpose(1, 2).contiguous()

    alst = UlyssesSPAttentionHF(
        attn=alst_core,
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=WIDTH,
        kv_head_count=key_heads,
        num_hidden_layers=1,
        process_group=group.group,
        seq_length_is_variable=True,
    )
    old = DistributedAttention(old_core, group.group, scatter_idx=2, gather_idx=1)

    def run_ours() -> None:
        q, k, v = scatter_heads(*(t.transpose(1, 2) for t in leaves), plan, group)
        measure.backward(gather_heads(core(q, k, v), plan, group).flatten(2).contiguous())

    def run_alst() -> None:
        q, k, v = (t.transpose(1, 2) for t in leaves)
        out, _ = alst(module, q, k, v, None, position_ids=positions)
        measure.backward(out.contiguous())

    def run_old() -> None:
        measure.backward(old(*leaves, 0).flatten(2).contiguous())

    return {OURS: run_ours, ALST: run_alst, OLD: run_old}


def _inputs(arguments: Any, tokens: int, device: torch.device) -> list[Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        torch.randn(1, tokens, n, WIDTH, device=device, dtype=dtype, requires_grad=True)
        for n in (arguments.heads, arguments.key_heads, arguments.key_heads)
    ]


# -- a training step ----------------------------------------------------------------------------


def _model(arguments: Any, length: int, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32 * arguments.heads,
        intermediate_size=86 * arguments.heads,
        num_hidden_layers=4,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_heads,
        vocab_size=8192,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(device).train()
    return model.bfloat16() if device.type == "cuda" else model


def _steps(
    arguments: Any, length: int, group: SequenceGroup, device: torch.device
) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 8192, (1, length), generator=generator).to(device)
    register()
    model = _model(arguments, length, device)
    batch = shard_batch({"input_ids": ids, "labels": ids}, group)
    alst = _alst_step(model, batch, group)

    def ours() -> None:
        model.config._attn_implementation = NAME
        loss = model(**batch, use_cache=False, num_items_in_batch=length - 1).loss * group.size
        model.config._attn_implementation = "sdpa"
        _finish(model, loss)

    def one() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        _finish(model, loss, average=False)

    return {OURS: ours, ALST: alst, ONE: measure.on_first_rank(one, group.size)}


_registered: list[Any] = []
"""ALST's attention function, which can be registered once a process."""


def _registered_alst(model: Any, size: int) -> Any:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", size, 1)
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def _alst_step(model: Any, batch: dict[str, Any], group: SequenceGroup) -> Callable[[], None]:
    """As DeepSpeed's tutorial has it: positions given, losses gathered and weighted by tokens."""
    from torch.distributed.nn.functional import all_gather
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not _registered:
        _registered.append(_registered_alst(model, group.size))
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
    theirs = _registered[0]
    labels = batch["shift_labels"]

    def step() -> None:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        loss = model.loss_function(
            logits=logits, labels=None, shift_labels=labels, vocab_size=logits.shape[-1]
        )
        count = labels.ne(IGNORE_INDEX).sum()
        losses, counts = all_gather(loss, group.group), all_gather(count, group.group)
        total = sum(one * n for one, n in zip(losses, counts, strict=True)) / sum(counts)
        _finish(model, total)

    return step


def _finish(model: Any, loss: Tensor, average: bool = True) -> None:
    loss.backward()
    for param in model.parameters():
        if average:
            dist.all_reduce(param.grad)
            param.grad /= dist.get_world_size()
        param.data.sub_(param.grad, alpha=1e-4)
        param.grad = None


if __name__ == "__main__":
    main()
