"""Finds the engine, refuses unsupported ones, and leaves no trace behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ulysses_monitor as um
from tests.support.exact_cases import lora
from tests.support.spawn import spawn
from ulysses_monitor.engines import find_engine


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


# -- one process --------------------------------------------------------------------------------


def test_compiling_and_checkpointing_leave_parameter_names_unchanged() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(2, 2), checkpoint_wrapper(nn.Linear(2, 2)))
    engine = find_engine(torch.compile(model, backend="eager"), sgd(model))
    names = [name for name, _ in engine.parameters()]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_accelerates_optimizer_wrapper_yields_the_optimizer_and_its_scaler() -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState

    Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    engine = find_engine(model, wrapped)
    assert engine.optimizer is optimizer
    assert float(engine.grad_scale()) == 8.0
    scaler.unscale_(optimizer)
    assert float(engine.grad_scale()) == 1.0
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (None, "the optimizer is None; expected the torch.optim.Optimizer"),
        (object(), "the optimizer is a object"),
    ],
)
def test_anything_but_an_optimizer_is_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(um.InputError, match=message):
        find_engine(nn.Linear(2, 2), optimizer)


def test_a_step_that_the_scaler_skips_has_no_update_ratio(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    sink = um.MemorySink()
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink], sample_every=1)
    with monitor.watch(model, optimizer, scaler=scaler):
        for step in range(3):
            loss = model(torch.ones(1, 2)).sum() * (torch.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    norms = {r.step: r["grad/norm/total"] for r in sink.records if "grad/norm/total" in r}
    assert norms == {1: pytest.approx(6**0.5), 2: 0.0, 3: pytest.approx(6**0.5)}
    bad = {r.step: r["grad/nonfinite/total"] for r in sink.records if "grad/norm/total" in r}
    assert bad == {1: 0.0, 2: 6.0, 3: 0.0}
    updated = [r.step for r in sink.records if "optim/update_ratio/total" in r]
    assert updated == [1]


def test_watching_leaves_optimizer_scaler_and_modules_unchanged(
    tmp_path: Path,
) -> None:
    model = lora()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")

    def state() -> list[Any]:
        hooks = [len(m._forward_pre_hooks) for m in model.modules()]
        steps = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
        return [hooks, steps, sorted(vars(scaler)), sorted(vars(optimizer))]

    before = state()
    with um.Monitor(tmp_path / "run", tensorboard=False).watch(model, optimizer, scaler=scaler):
        assert state() != before
    assert state() == before


# -- several -----------------------------------------------------------------------------------


def refusals(folder: str) -> dict[str, str]:
    """Returns the message with which each unsupported engine is refused."""
    import deepspeed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    deepspeed.init_distributed(dist_backend="gloo")
    said: dict[str, str] = {}

    def attempt(name: str, model: nn.Module, optimizer: Any) -> None:
        try:
            with um.Monitor(f"{folder}/{name}").watch(model, optimizer):
                said[name] = "watched"
        except um.InputError as error:
            said[name] = str(error)

    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    attempt("fsdp1", model, sgd(model))

    ddp = DistributedDataParallel(nn.Linear(4, 4))
    zero = ZeroRedundancyOptimizer(ddp.parameters(), optimizer_class=torch.optim.Adam)
    attempt("zero redundancy", ddp, zero)

    alone = DistributedDataParallel(
        nn.Linear(4, 4), process_group=[dist.new_group([r]) for r in (0, 1)][dist.get_rank()]
    )
    attempt("ddp of one rank each", alone, sgd(alone))

    mesh = init_device_mesh("cpu", (2,))
    columns = nn.Linear(4, 4)
    columns.weight = nn.Parameter(distribute_tensor(columns.weight.data, mesh, [Shard(1)]))
    attempt("columns", columns, sgd(columns))

    partly = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(partly[0], mesh=mesh)
    attempt("partly sharded", partly, sgd(partly))

    engine, *_ = deepspeed.initialize(
        model=(net := nn.Linear(4, 4)),
        optimizer=sgd(net),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1},
        },
    )
    version, deepspeed.__version__ = deepspeed.__version__, "0.99.1"
    attempt("deepspeed version", engine, None)
    deepspeed.__version__ = version
    engine.has_moe_layers = True
    attempt("deepspeed experts", engine, None)
    engine.has_moe_layers = False
    type(engine.optimizer).__name__ = "MiCS_Optimizer"
    attempt("deepspeed optimizer", engine, None)
    type(engine.optimizer).__name__ = "DeepSpeedZeroOptimizer"
    return said


EXPECTED = {
    "fsdp1": "FSDP1.* is not supported; use fully_shard",
    "zero redundancy": "optimizer is a ZeroRedundancyOptimizer; expected an optimizer that",
    "ddp of one rank each": "DistributedDataParallel spans 1 of 2 ranks",
    "columns": r"parameter weight is placed as .*Shard\(dim=1\).*expected rows over all ranks",
    "partly sharded": "parameter 1.weight is placed as a plain tensor",
    "deepspeed version": r"the DeepSpeed version is 0.99.1; allowed: 0.19.\*",
    "deepspeed experts": "DeepSpeed runs with mixture-of-experts layers, which is not supported",
    "deepspeed optimizer": "in ZeRO-1 is MiCS_Optimizer; allowed: DeepSpeedZeroOptimizer, BF16_Opt",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], Path]:
    folder = tmp_path_factory.mktemp("refused")
    return spawn(refusals, 2, args=[str(folder)], timeout=100), folder


@pytest.mark.parametrize("name", EXPECTED)
def test_an_unsupported_engine_is_refused_on_every_rank_before_anything_is_written(
    said: tuple[list[dict[str, str]], Path], name: str
) -> None:
    by_rank, folder = said
    for words in by_rank:
        assert words[name].count("\n") == 0
        with pytest.raises(um.InputError, match=EXPECTED[name]):
            raise um.InputError(words[name])
    assert not (folder / name).exists()
