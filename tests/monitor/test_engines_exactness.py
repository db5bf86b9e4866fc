"""Metrics under every engine against the same training on one process, in float64, by hand.

The reference takes, at each step, the weights that the engine enters the step with, and computes
the gradient of the whole world's batch in float64. So an error cannot hide in, nor come from, the
path that the training took.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from torch import Tensor, nn

import ulysses_monitor as um

STEPS = 3
LR, BETAS, EPS = 1e-2, (0.9, 0.99), 1e-8
ROWS = 2


class Toy(nn.Module):
    """Layers of odd sizes, one wider than a block of sums, a frozen part, a part without use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 33)
        widths = (33, 31, 171, 33)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.frozen = nn.Linear(33, 33).requires_grad_(False)
        self.unused = nn.Linear(5, 3)
        self.head = nn.Linear(33, 29)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits = self.head(x + self.frozen(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())


def toy() -> nn.Module:
    torch.manual_seed(0)
    return Toy()


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=29,
        max_position_embeddings=32,
    )
    adapters = LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"])
    return _Loss(get_peft_model(LlamaForCausalLM(config), adapters))


MODELS: dict[str, Callable[[], nn.Module]] = {"toy": toy, "lora": lora}


@dataclass(frozen=True, kw_only=True)
class Case:
    engine: str
    model: str = "toy"
    accumulate: int = 1
    clip: float = 0.0
    bits: str = "fp32"

    @property
    def label(self) -> str:
        parts = (self.engine, self.model, f"ga{self.accumulate}", f"clip{self.clip:g}", self.bits)
        return "-".join(parts)


def batches(step: int, world: int, accumulate: int) -> Tensor:
    """[world, accumulate, ROWS, 7]"""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 29, (world, accumulate, ROWS, 7), generator=generator)


# -- the engines ------------------------------------------------------------------------------


def deepspeed_engine(model: nn.Module, case: Case) -> Any:
    import deepspeed

    zero: dict[str, Any] = {"stage": int(case.engine[4])}
    if case.engine.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": case.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if case.bits == "bf16":
        config["bf16"] = {"enabled": True}
    if case.bits == "fp16":
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed refuses fp16 on a CPU for its speed; torch can do it.
        get_accelerator().is_fp16_supported = lambda: True
        config["fp16"] = {"enabled": True, "loss_scale": 1024.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=config)
    return engine


def adam(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)


def train(case: Case, run_dir: str, rank: int, world: int) -> tuple[list[dict], list[dict], Any]:
    """Trains with the monitor; gives the records, the weights before each step, and the shards."""
    model, sink = MODELS[case.model](), um.MemorySink()
    monitor = um.Monitor(
        run_dir, tensorboard=False, sinks=[sink], sample_every=1, if_exists="overwrite"
    )
    zero = case.engine.startswith("zero")
    wrapped: Any = model
    if zero:
        wrapped = deepspeed_engine(model, case)
    elif case.engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = None if zero else adam(model)
    weights, shards = [], []
    if zero:
        shards = held_by_this_rank(wrapped)
    with monitor.watch(wrapped, optimizer):
        for step in range(STEPS):
            weights.append({n: p.detach().clone() for n, p in model.state_dict().items()})
            mine = batches(step, world, case.accumulate)[rank]
            if zero:
                for ids in mine:
                    wrapped.backward(wrapped(ids))
                    wrapped.step()
            else:
                plain_step(wrapped, optimizer, mine, case, monitor)
    return [r.to_dict() for r in sink.records], weights, shards


def plain_step(model: Any, optimizer: Any, mine: Tensor, case: Case, monitor: um.Monitor) -> None:
    for ids in mine:
        (model(ids) / len(mine)).backward()
    monitor.before_clip()
    if case.clip:
        nn.utils.clip_grad_norm_(model.parameters(), case.clip)
    optimizer.step()
    optimizer.zero_grad()


def held_by_this_rank(engine: Any) -> list[list[int]]:
    """Index, offset and size of what this rank holds of each trainable parameter."""
    held = []
    for i, param in enumerate(p for p in engine.module.parameters() if p.requires_grad):
        mapping = param._hp_mapping
        if mapping is not None:
            address = mapping.lp_fragment_address
            held.append([i, address.start, address.numel])
    return held


# -- the reference ----------------------------------------------------------------------------


def reference(case: Case, weights: list[dict[str, Tensor]], world: int) -> Iterator[dict]:
    """The metrics of each step, in float64, on one process."""
    model = MODELS[case.model]().double()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    first = {n: torch.zeros_like(p) for n, p in trained.items()}
    second = copy.deepcopy(first)
    for step in range(STEPS):
        model.load_state_dict({n: w.double() for n, w in weights[step].items()})
        model.zero_grad()
        every = batches(step, world, case.accumulate).flatten(0, 1)
        (sum(model(ids) for ids in every) / len(every)).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        yield metrics_of(trained, grads, first, second, case, step)
        total = norm(grads.values())
        coefficient = min(1.0, case.clip / (total + 1e-6)) if case.clip else 1.0
        for name, grad in grads.items():
            clipped = grad * coefficient
            first[name].mul_(BETAS[0]).add_(clipped, alpha=1 - BETAS[0])
            second[name].mul_(BETAS[1]).addcmul_(clipped, clipped, value=1 - BETAS[1])


def norm(tensors: Any) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def mean(tensors: Any) -> float:
    flat = [t.flatten() for t in tensors]
    return float(torch.cat(flat).mean()) if flat else math.nan


def metrics_of(
    trained: dict, grads: dict, first: dict, second: dict, case: Case, step: int
) -> dict[str, float]:
    scopes = {"total": list(trained)} | {f"param/{n}": [n] for n in trained}
    for name in trained:
        if "layers." in name:
            layer = f"layer/{name.split('layers.')[1].split('.')[0]}"
            scopes[layer] = [*scopes.get(layer, []), name]
    # torch makes no state for a parameter that got no gradient; ZeRO's flat buffers have zeros.
    zero = case.engine.startswith("zero")
    stateful = {n for n in trained if zero or not n.startswith("unused")}
    out = {}
    for scope, names in scopes.items():
        out[f"grad/norm/{scope}"] = norm(grads[n] for n in names)
        out[f"grad/nonfinite/{scope}"] = 0.0
        out[f"param/norm/{scope}"] = norm(trained[n].detach() for n in names)
        if step:
            out[f"optim/exp_avg_norm/{scope}"] = norm(first[n] for n in names)
            out[f"optim/exp_avg_sq_mean/{scope}"] = mean(second[n] for n in names if n in stateful)
    if case.clip and zero:
        out["grad/clip_coef/total"] = min(1.0, case.clip / (out["grad/norm/total"] + 1e-6))
    ratios = []
    for name in trained:
        if ".lora_A." in name:
            a, b = norm([grads[name]]), norm([grads[name.replace("lora_A", "lora_B")]])
            ratios.append(math.inf if a == 0 else b / a)
            out[f"lora/grad_ratio_B_A/module/{name.split('.lora_A')[0]}"] = ratios[-1]
    if ratios:
        out["lora/grad_ratio_B_A/total"] = statistics.median(ratios)
    return out


FAMILIES = {
    "grad/norm",
    "grad/clip_coef",
    "grad/nonfinite",
    "param/norm",
    "optim/exp_avg_norm",
    "optim/exp_avg_sq_mean",
    "lora/grad_ratio_B_A",
}


def worst_errors(records: list[dict], expected: list[dict]) -> dict[str, float]:
    """The worst relative error of each family, over parameters, layers, total and steps."""
    assert len(records) == len(expected)
    worst: dict[str, float] = {}
    for record, truth in zip(records, expected, strict=True):
        assert {n for n in record if family_of(n) in FAMILIES} == truth.keys()
        for name, value in truth.items():
            family = family_of(name)
            worst[family] = max(worst.get(family, 0.0), relative(record[name], value))
    return worst


def family_of(name: str) -> str:
    return "/".join(name.split("/")[:2])


def relative(got: float, truth: float) -> float:
    if got == truth or (math.isnan(got) and math.isnan(truth)):
        return 0.0
    return abs(got - truth) / abs(truth) if truth and math.isfinite(truth) else math.inf


def run_cases(cases: list[dict], folder: str) -> dict[str, Any]:
    """The child: every case in turn, the comparison on rank 0."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if any(case["engine"].startswith("zero") for case in cases):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    results: dict[str, Any] = {}
    for number, settings in enumerate(cases):
        case = Case(**settings)
        records, weights, held = train(case, f"{folder}/{number}", rank, world)
        worst = None
        if rank == 0:
            worst = worst_errors(records, list(reference(case, weights, world)))
        results[case.label] = {"worst": worst, "held": held}
    return results


def errors_of(cases: list[Case], world: int, folder: Path, timeout: float) -> list[dict]:
    return spawn(
        run_cases, world, args=[[vars(case) for case in cases], str(folder)], timeout=timeout
    )


def assert_exact(results: dict[str, Any], case: Case, bounds: dict[str, float]) -> None:
    worst = results[case.label]["worst"]
    assert {"grad/norm", "param/norm", "optim/exp_avg_norm"} <= worst.keys()
    too_far = {f: e for f, e in worst.items() if e > bounds.get(f, bounds["all"])}
    assert not too_far, f"{case.label}: {worst}"


FP32 = {"all": 1e-5, "grad/nonfinite": 0.0}
BF16 = {"all": 2e-2, "grad/nonfinite": 0.0}
FP16 = {"all": 3e-3, "grad/nonfinite": 0.0}
"""bf16 keeps 8 bits: each element is off by up to 2^-9, through three layers and a sum a few times
that. fp16 keeps 11. The reference starts from the rounded weights, in float64."""

ONE = [
    Case(engine="plain"),
    Case(engine="plain", accumulate=3, clip=0.1),
    Case(engine="plain", model="lora"),
]
TWO = [
    Case(engine="ddp"),
    Case(engine="ddp", accumulate=3, clip=0.1),
    Case(engine="ddp", model="lora"),
    Case(engine="zero1"),
    Case(engine="zero1", accumulate=3, clip=0.1),
    Case(engine="zero2", clip=0.1),
    Case(engine="zero2", accumulate=3),
    Case(engine="zero2", model="lora", clip=0.01, accumulate=3),
    Case(engine="zero2-offload", accumulate=3, clip=0.1),
    Case(engine="zero1-offload", clip=0.1),
]
THREE = [
    Case(engine="ddp", accumulate=3),
    Case(engine="zero2", accumulate=3, clip=0.1),
    Case(engine="zero1", model="lora"),
]
HALF = [
    Case(engine="zero1", bits="bf16"),
    Case(engine="zero2", bits="bf16", clip=0.1, accumulate=3),
    Case(engine="zero2", bits="fp16", clip=0.1),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return errors_of([*TWO, *HALF], 2, tmp_path_factory.mktemp("two"), 150)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return errors_of(THREE, 3, tmp_path_factory.mktemp("three"), 120)


@pytest.mark.parametrize("case", ONE, ids=lambda c: c.label)
def test_metrics_of_a_plain_loop_equal_float64(case: Case, tmp_path: Path) -> None:
    assert_exact(run_cases([vars(case)], str(tmp_path)), case, FP32)


@pytest.mark.parametrize("case", TWO, ids=lambda c: c.label)
def test_metrics_on_two_ranks_equal_one_process_in_float64(two: list[dict], case: Case) -> None:
    assert_exact(two[0], case, FP32)


@pytest.mark.parametrize("case", THREE, ids=lambda c: c.label)
def test_metrics_on_three_ranks_equal_one_process_in_float64(three: list[dict], case: Case) -> None:
    assert_exact(three[0], case, FP32)


@pytest.mark.parametrize("case", HALF, ids=lambda c: c.label)
def test_metrics_in_half_precision_are_within_its_rounding(two: list[dict], case: Case) -> None:
    """With fp16 the gradients are read while still multiplied by a loss scale of 1024."""
    assert_exact(two[0], case, BF16 if case.bits == "bf16" else FP16)


@pytest.mark.parametrize("world", [2, 3])
def test_the_zero_cases_cut_a_parameter_and_leave_a_rank_without_another(
    two: list[dict], three: list[dict], world: int
) -> None:
    """Otherwise the tests above would not test what they are for."""
    results = {2: two, 3: three}[world]
    case = Case(engine="zero2", accumulate=3, clip=0.0 if world == 2 else 0.1)
    held = [result[case.label]["held"] for result in results]
    holders: dict[int, list[int]] = {}
    for rank, shards in enumerate(held):
        for index, _, numel in shards:
            assert numel > 0
            holders.setdefault(index, []).append(rank)
    assert any(len(ranks) > 1 for ranks in holders.values())
    assert any(len(ranks) == 1 for ranks in holders.values())
    assert any(offset > 0 for shards in held for _, offset, _ in shards)


def test_clipping_really_happens_in_the_clipped_cases(tmp_path: Path) -> None:
    """Norms that pass the tests above are then norms from before clipping."""
    case = Case(engine="plain", clip=0.1)
    records, *_ = train(case, str(tmp_path), 0, 1)
    assert all(record["grad/norm/total"] > 2 * case.clip for record in records)
