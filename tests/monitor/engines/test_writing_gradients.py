"""Written gradients reach the clipping and the step of every engine.

SGD shows a wrong scale, which Adam would hide. Clipping is on, so that a norm taken before the
writing shows too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.exact_cases import MODELS, Case, batches
from tests.support.exact_engines import whole_weights, wrap
from tests.support.spawn import spawn
from ulysses_monitor.engines import find_engine

CLIP = 0.3
LR = 0.5


def factor(index: int) -> float:
    """Returns a factor that differs by parameter: clipping would undo a common one."""
    return 0.25 if index % 2 else 3.0


def edit(engine: Any) -> None:
    for shard in engine.shards():
        if shard.grad is not None:
            engine.set_gradient(shard, shard.grad * factor(shard.index))
    engine.commit_gradients()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)


def written(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the weights after two training steps with edited gradients."""
    case = Case(**settings)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if case.engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    model = MODELS["toy"]()
    wrapped, optimizer, _ = wrap(model, case, sgd)
    engine = find_engine(wrapped, optimizer)
    undo = engine.hook_step(lambda: edit(engine), lambda _: None)
    for step in range(2):
        (ids,) = batches(step, world, 1)[rank]
        if case.engine.startswith("zero"):
            wrapped.backward(wrapped(ids))
            wrapped.step()
            continue
        undo()  # a plain loop clips before the step: here the edit comes first
        wrapped(ids).backward()
        edit(engine)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return whole_weights(model)


def expected(world: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the weights before and after the same steps, by hand in float64."""
    model = MODELS["toy"]().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = sgd(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(2):
        every = batches(step, world, 1).flatten(0, 1)
        (sum(model(ids) for ids in every) / len(every)).backward()
        for i, param in enumerate(trained):
            if param.grad is not None:
                param.grad.mul_(factor(i))
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return before, dict(model.named_parameters())


CASES = [
    ("plain", "fp32", 1),
    ("ddp", "fp32", 2),
    ("zero0", "fp32", 2),
    ("zero0", "bf16", 2),
    ("zero1", "fp32", 2),
    ("zero1", "bf16acc32", 2),
    ("zero1-offload", "fp32", 2),
    ("zero2", "fp32", 3),
    ("zero2-offload", "fp32", 2),
    ("zero3", "fp32", 3),
    ("zero3-offload", "fp32", 2),
    ("zero3-offload-all", "fp32", 2),
    ("fsdp2", "fp32", 3),
    ("hsdp", "fp32", 4),
]


def all_written(cases: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    return [written(settings) for settings in cases]


@pytest.fixture(scope="module")
def weights() -> dict[tuple[str, str], list[dict[str, torch.Tensor]]]:
    """Maps each case to the weights of each rank."""
    found = {}
    for world in (1, 2, 3, 4):
        here = [(engine, bits) for engine, bits, ranks in CASES if ranks == world]
        settings = [{"engine": engine, "bits": bits, "clip": CLIP} for engine, bits in here]
        of_ranks = spawn(all_written, world, args=[settings], timeout=100)
        found |= {case: [rank[i] for rank in of_ranks] for i, case in enumerate(here)}
    return found


@pytest.mark.parametrize(("engine", "bits", "world"), CASES)
def test_the_engine_clips_and_steps_with_written_gradients(
    weights: dict, engine: str, bits: str, world: int
) -> None:
    before, truth = expected(world)
    # The change is right to 1e-5; the weights that carry it are rounded.
    bound, rounding = (1e-5, 1e-7) if bits == "fp32" else (3e-2, 4e-3)
    for of_rank in weights[engine, bits]:
        for name, param in truth.items():
            moved = (param.detach() - before[name]).norm()
            error = (of_rank[name].double() - param.detach()).norm()
            assert error <= bound * moved + rounding * before[name].norm(), name


def test_writing_to_a_parameter_without_a_gradient_raises() -> None:
    model = nn.Linear(2, 2)
    engine = find_engine(model, sgd(model))
    with pytest.raises(ValueError, match="weight got no gradient in this step"):
        engine.set_gradient(next(engine.shards()), torch.zeros(2, 2))
