"""The monitor around a loop of accelerate's: `prepare`, `accumulate`, `clip_grad_norm_`.

A child runs the loop twice with one seed, bare and watched, and hands back what hooks of its own
saw; a test compares one thing in it. ``unsaid`` is the loop that does not call `before_clip`.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.forget import forget_last_trainer
from tests.support.hf_cases import VOCAB
from tests.support.spawn import SpawnError, spawn

CLIP = 0.05
ROWS = 10  # of each rank: windows of 2, 2 and 1 micro-batches of 2 rows in each of 2 epochs
CASES = {1: ["plain", "plain-bf16", "plain-unsaid"], 2: ["ddp", "ddp-bf16", "zero2"]}
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": CLIP,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def prepared(case: str) -> tuple[Any, Any, Any, Any, Any]:
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    PartialState(cpu=True)  # as transformers does: `Accelerator(cpu=True)` refuses DeepSpeed
    accelerator = Accelerator(
        gradient_accumulation_steps=2,
        mixed_precision="bf16" if "bf16" in case else "no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dict(ZERO2)) if case == "zero2" else None,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, VOCAB, (ROWS * accelerator.num_processes, 9), generator=generator)
    lengths = 3 + torch.arange(len(rows)) % 7
    mask = (torch.arange(9) < lengths[:, None]).long()
    data = [{"input_ids": r, "attention_mask": m} for r, m in zip(rows, mask, strict=True)]
    loader = DataLoader(data, batch_size=2)  # type: ignore[arg-type]
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def loop(case: str, monitor: um.Monitor | None, seen: dict[str, list[float]]) -> Any:
    """What a user writes; `seen` is filled by hooks beside it."""
    accelerator, model, optimizer, loader, scheduler = prepared(case)
    look_on(accelerator, model, optimizer, seen)
    with monitor.watch(model, optimizer) if monitor else nullcontext():
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                    loss = model(**batch, labels=labels).loss
                    if monitor:
                        monitor.observe(
                            loss=loss / accelerator.gradient_accumulation_steps,
                            tokens=batch["attention_mask"].sum(),
                            loss_tokens=labels[:, 1:].ne(-100).sum(),
                        )
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        if monitor and "unsaid" not in case:
                            monitor.before_clip()
                        accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
    return accelerator.unwrap_model(model), optimizer


# -- the child --------------------------------------------------------------------------------


def look_on(
    accelerator: Any, model: nn.Module, optimizer: Any, seen: dict[str, list[float]]
) -> None:
    """Notes of each step what it is before clipping."""
    clip, window = accelerator.clip_grad_norm_, Counter[str]()

    def clip_grad_norm_(parameters: Any, max_norm: float) -> Any:
        parameters = list(parameters)
        squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
        norm = clip(parameters, max_norm)  # DeepSpeed's is of before clipping, its gradients gone
        seen["norm"].append(math.sqrt(sum(squares)) if squares else float(norm))
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        for key in ("loss", "tokens", "labels"):
            seen[key].append(window[key])
        window.clear()
        return norm

    def forward(_: Any, args: Any, inputs: dict[str, Tensor], output: Any) -> None:
        window["loss"] += output.loss.item() / 2
        window["tokens"] += int(inputs["attention_mask"].sum())
        window["labels"] += int(inputs["labels"][:, 1:].ne(-100).sum())

    accelerator.clip_grad_norm_ = clip_grad_norm_
    model.register_forward_hook(forward, with_kwargs=True)


def hooks(optimizer: Any) -> dict[str, Any]:
    """Numbers of hooks, and patched methods, of accelerate's wrapper and all that it wraps."""
    found: dict[str, Any] = {}
    while optimizer is not None:
        for key, value in vars(optimizer).items():
            if "hooks" in key or callable(value):
                patched = getattr(value, "__qualname__", "")
                found[f"{type(optimizer).__name__}.{key}"] = (
                    len(value) if "hooks" in key else patched
                )
        optimizer = getattr(optimizer, "optimizer", None)
    return found


def watch_loops(root: str, cases: list[str]) -> dict[str, Any]:
    if dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    facts: dict[str, Any] = {}
    for case in cases:
        try:
            facts[case] = loop_twice(case, Path(root, case))
        except Exception:  # noqa: BLE001 - the tests of this case report it
            facts[case] = traceback.format_exc()
        forget_last_trainer()
    return facts


def loop_twice(case: str, run: Path) -> dict[str, Any]:
    bare, bare_optimizer = loop(case, None, defaultdict(list))
    forget_last_trainer()
    sink, seen = um.MemorySink(), defaultdict(list)
    model, optimizer = loop(case, um.Monitor(run, tensorboard=False, sinks=[sink]), seen)
    steps = [r for r in sink.records if "train/step_seconds/total" in r]
    trained = bare.state_dict()
    return dict(seen) | {
        "steps": [r.step for r in steps],
        "records": [dict(zip(r.schema.names, r.values.tolist(), strict=True)) for r in steps],
        "changed": [k for k, v in model.state_dict().items() if not torch.equal(v, trained[k])],
        "hooks_alike": hooks(optimizer) == hooks(bare_optimizer),
    }


# -- the tests --------------------------------------------------------------------------------

Facts = Callable[[str], list[dict[str, Any]]]
each_case = pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases])


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What each rank saw of a case."""

    @cache
    def of_world(processes: int) -> list[dict[str, Any]] | str:
        root = str(tmp_path_factory.mktemp("loop"))
        try:
            return spawn(watch_loops, processes, args=[root, CASES[processes]], timeout=90)
        except SpawnError as error:
            return str(error)  # for every test of this world, and not tried again for each

    def of(case: str) -> list[dict[str, Any]]:
        world = of_world(1 if case in CASES[1] else 2)
        assert not isinstance(world, str), world
        ranks = [seen[case] for seen in world]
        assert not any(isinstance(seen, str) for seen in ranks), ranks
        return ranks

    return of


def recorded(ranks: list[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in ranks[0]["records"]]


def all_ranks(ranks: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([seen[name] for seen in ranks], dtype=torch.float64).sum(0)


@each_case
def test_a_step_ends_with_the_accumulation(facts: Facts, case: str) -> None:
    assert facts(case)[0]["steps"] == [1, 2, 3, 4, 5, 6]
    assert len(facts(case)[0]["norm"]) == 6
    assert all(seen["steps"] == [] for seen in facts(case)[1:])


@each_case
def test_the_norm_is_read_before_clipping_if_the_loop_calls_before_clip(
    facts: Facts, case: str
) -> None:
    norms, truth = recorded(facts(case), "grad/norm/total"), facts(case)[0]["norm"]
    assert min(truth) > 2 * CLIP
    assert norms == pytest.approx(truth, rel=1e-4 if case == "zero2" else 1e-6)
    if case == "zero2":  # DeepSpeed trains what DDP trains
        assert norms == pytest.approx(facts("ddp")[0]["norm"], rel=1e-4)


@each_case
def test_loss_tokens_and_rate_are_the_steps_own(facts: Facts, case: str) -> None:
    ranks = facts(case)
    losses = all_ranks(ranks, "loss") / len(ranks)
    assert recorded(ranks, "train/loss/total") == pytest.approx(losses.tolist(), rel=1e-6)
    speed = torch.tensor(recorded(ranks, "train/tokens_per_second/total"), dtype=torch.float64)
    seconds = torch.tensor(recorded(ranks, "train/step_seconds/total"), dtype=torch.float64)
    torch.testing.assert_close(speed * seconds, all_ranks(ranks, "tokens"))
    assert recorded(ranks, "train/loss_tokens/total") == all_ranks(ranks, "labels").tolist()
    assert recorded(ranks, "optim/lr/0") == pytest.approx(ranks[0]["lr"], rel=1e-9)
    assert len(set(ranks[0]["lr"])) == 6


@each_case
def test_the_training_is_bit_equal_and_no_hook_remains(facts: Facts, case: str) -> None:
    for seen in facts(case):
        assert seen["changed"] == []
        assert seen["hooks_alike"]
