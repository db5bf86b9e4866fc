"""A training that trains other parameters from some step on is followed, exactly, on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.exact_cases import MODELS, Case, batches
from tests.support.exact_engines import merged, whole_weights, wrap
from tests.support.exact_reference import gradient_metrics, parameter_metrics, relative
from tests.support.spawn import spawn
from ulysses_monitor.engines import find_engine

STEPS = 6
Choice = Callable[[int, str], bool]
"""Tells whether a parameter is trained at a step."""


def lisa(step: int, name: str) -> bool:
    """Embedding and head always, one layer for two steps at a time (arXiv 2403.17919)."""
    return name.startswith(("embed", "head")) or f"layers.{step // 2 % 3}." in name


def badam(step: int, name: str) -> bool:
    """One block at a time, two steps each (arXiv 2404.02827)."""
    return name.startswith(("head", "layers.2", "layers.1", "layers.0")[step // 2 % 4])


def unfreezing(step: int, name: str) -> bool:
    """From the head down, one more layer every other step."""
    return name.startswith(("head", *("layers.2", "layers.1", "layers.0")[: step // 2]))


CHOICES: dict[str, Choice] = {f.__name__: f for f in (lisa, badam, unfreezing)}


def choose(model: nn.Module, choice: Choice, step: int) -> None:
    for name, param in model.named_parameters():
        param.requires_grad_(choice(step, name))


def all_but_frozen(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for n, p in model.named_parameters() if "frozen" not in n], lr=1e-2, betas=(0.9, 0.99)
    )


def train(
    choice: Choice, engine: str, folder: str, bits: str = "fp32"
) -> tuple[list[dict[str, float]], list[dict[str, Tensor]], list[um.Event]]:
    """Returns the records, the weights before each step and at the end, and the events."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model, sink = MODELS["toy"](), um.MemorySink()
    wrapped, optimizer, scaler = wrap(model, Case(engine=engine, bits=bits), all_but_frozen)
    monitor = um.Monitor(folder, tensorboard=False, sinks=[sink], sample_every=1)
    choose(model, choice, 0)
    weights = []
    with monitor.watch(wrapped, optimizer, scaler=scaler):
        for step in range(STEPS):
            choose(model, choice, step)
            weights.append(whole_weights(model))
            (ids,) = batches(step, world, 1)[rank]
            loss = wrapped(ids)
            if engine.startswith("zero"):
                wrapped.backward(loss)
                wrapped.step()
                continue
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        weights.append(whole_weights(model))
    return merged(sink), weights, [e for e in sink.events if "parameters" in e.data]


def reference(
    choice: Choice, weights: list[dict[str, Tensor]], world: int
) -> Iterator[dict[str, float]]:
    model = MODELS["toy"]().double()
    for step in range(STEPS):
        model.load_state_dict({n: w.double() for n, w in weights[step].items()})
        choose(model, choice, step)
        model.zero_grad()
        every = batches(step, world, 1).flatten(0, 1)
        (sum(model(ids) for ids in every) / len(every)).backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        after = {n: weights[step + 1][n].double() for n in trained}
        yield gradient_metrics({n: p.grad for n, p in trained.items()}) | parameter_metrics(
            trained, after
        )


def worst_error(choice: Choice, records: Any, weights: Any, world: int, moved: float) -> None:
    expected = list(reference(choice, weights, world))
    assert len(records) == len(expected)
    for step, (record, truth) in enumerate(zip(records, expected, strict=True)):
        kinds = ("grad/norm", "grad/abs_mean", "grad/max", "param/norm", "optim/update_ratio")
        got = {n for n in record if n.startswith(kinds)}
        truth = {n: v for n, v in truth.items() if n.startswith(kinds)}
        if step == STEPS - 1:
            truth = {n: v for n, v in truth.items() if "update_ratio" not in n}
        assert got == truth.keys(), (step, sorted(got ^ truth.keys()))
        for name, value in truth.items():
            bound = moved if "update_ratio" in name else 1e-5
            assert relative(record[name], value) < bound, (step, name, record[name], value)


@pytest.mark.parametrize("name", CHOICES)
def test_a_plain_loop_is_followed_exactly(name: str, tmp_path: Path) -> None:
    records, weights, events = train(CHOICES[name], "plain", str(tmp_path / "run"))
    worst_error(CHOICES[name], records, weights, 1, 1e-3)
    assert [e.data["first_step"] for e in events] == [3, 5]
    assert {e.data["parameters"] for e in events} == {"followed"}


def test_a_gradscalers_training_is_followed_exactly(tmp_path: Path) -> None:
    records, weights, _ = train(lisa, "plain", str(tmp_path / "run"), bits="amp")
    worst_error(lisa, records, weights, 1, 1e-3)


def test_the_store_and_the_reader_carry_what_was_trained(tmp_path: Path) -> None:
    records, *_ = train(lisa, "plain", str(tmp_path / "run"))
    frame = um.open_run(tmp_path / "run").metrics("grad/norm/*")
    for step, record in enumerate(records, start=1):
        norms = {n: v for n, v in record.items() if n.startswith("grad/norm/")}
        row = frame.loc[step].dropna()
        assert row.index.tolist() == [c for c in frame.columns if c in norms]
        np.testing.assert_allclose(row, [norms[n] for n in row.index], rtol=1e-6)


def test_parameters_that_the_optimizer_takes_later_are_followed(tmp_path: Path) -> None:
    """Also a module that the model gets later, and groups that are replaced by others."""
    model, sink = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}), um.MemorySink()
    model["b"].requires_grad_(False)
    optimizer = torch.optim.AdamW(model["a"].parameters(), lr=1e-2)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink], sample_every=1)
    before: list[Tensor] = []
    with monitor.watch(model, optimizer):
        for step in range(4):
            if step == 1:
                model["b"].requires_grad_(True)
                optimizer.add_param_group({"params": list(model["b"].parameters()), "lr": 1e-3})
            if step == 2:
                model["c"] = nn.Linear(2, 2)
                optimizer.param_groups[1]["params"] = list(model["c"].parameters())
            if step == 3:
                for param in model["b"].parameters():
                    del optimizer.state[param]
                state = optimizer.state_dict()
                state["param_groups"][0]["lr"] = 1e-4
                optimizer.load_state_dict(state)
            before = [p.detach().clone() for p in model["a"].parameters()]
            sum((p - 0.5).square().sum() for p in model.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
        model["a"].weight.grad = torch.zeros(3, 3)
        optimizer.step()
    records = merged(sink)
    names = [{n.split("/")[-1] for n in r if n.startswith("grad/norm/param/")} for r in records]
    sides = [{"a.weight", "a.bias"}, {"b.weight", "b.bias"}, {"c.weight", "c.bias"}]
    assert names[:3] == [sides[0], sides[0] | sides[1], sides[0] | sides[1] | sides[2]]
    assert records[1]["optim/lr/1"] == 1e-3
    assert records[1]["optim/update_ratio/param/b.weight"] > 0
    assert records[2]["optim/update_ratio/param/b.weight"] == 0, "no longer in the optimizer"
    assert records[2]["optim/update_ratio/param/c.weight"] > 0
    assert (
        records[3]["optim/update_ratio/param/a.weight"] < 1e-4 * 3 / float(before[0].norm()) * 1.1
    )
    assert records[3]["optim/lr/0"] == 1e-4


def test_looking_for_a_change_costs_little(tmp_path: Path) -> None:
    """A thousand parameters: far below a millisecond; the bound holds on a busy machine."""
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(500))
    engine = find_engine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    times = []
    for _ in range(50):
        began = time.perf_counter()
        assert engine.find_change() is None
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3


def test_a_model_that_is_frozen_as_a_whole_is_told_and_trains_on(tmp_path: Path) -> None:
    model, sink = nn.Linear(2, 2), um.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink])
    with monitor.watch(model, optimizer):
        for step in range(4):
            model.requires_grad_(step not in (1, 2))
            optimizer.step()
    told = [e.data["error"] for e in sink.events if "parameters" in e.data]
    assert [reason.split(";")[0] for reason in told] == ["the model has no trainable parameters"]
    assert [r.step for r in sink.records if "grad/norm/total" in r] == [1, 4]


def test_a_layer_keeps_its_name_when_another_list_of_layers_is_trained(tmp_path: Path) -> None:
    towers = {
        name: nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
        for name in ("vision", "language")
    }
    model, sink = nn.ModuleDict(towers), um.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = um.Monitor(tmp_path / "run", tensorboard=False, sinks=[sink])
    with monitor.watch(model, optimizer):
        for step in range(2):
            model["vision"].requires_grad_(step == 1)
            optimizer.step()
    layers = [
        [n.removeprefix("grad/norm/") for n in r.schema.names if n.startswith("grad/norm/layer/")]
        for r in sink.records
        if "grad/norm/total" in r
    ]
    assert layers == [
        ["layer/language.layers.0"],
        ["layer/vision.layers.0", "layer/language.layers.0"],
    ]


# -- several ranks ------------------------------------------------------------------------------

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")


def train_each(folder: str) -> dict[str, Any]:
    """Returns what rank 0 recorded under each engine."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    found = {}
    for engine in ENGINES:
        records, weights, events = train(lisa, engine, f"{folder}/{engine}")
        told = [dict(e.data) for e in events]
        found[engine] = {"records": records, "weights": weights, "events": told}
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return spawn(train_each, 2, args=[str(tmp_path_factory.mktemp("runs"))], timeout=240)[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_follow_exactly(trained: dict[str, Any], engine: str) -> None:
    found = trained[engine]
    worst_error(lisa, found["records"], found["weights"], 2, 1e-3)
    assert [e["first_step"] for e in found["events"]] == [3, 5]


def train_what_cannot_be_followed(folder: str) -> dict[str, Any]:
    """Returns what rank 0 recorded: weights of the last case are those without a monitor."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    rank, found = dist.get_rank(), {}
    for engine in ("ddp", "zero2", "zero3", "differs"):
        torch.manual_seed(0)
        model, sink = MODELS["toy"](), um.MemorySink()
        if engine != "differs":
            choose(model, badam, 0)
        kind = "ddp" if engine == "differs" else engine
        make = all_but_frozen if kind == "ddp" else trainable_only
        wrapped, optimizer, _ = wrap(model, Case(engine=kind), make)
        monitor = um.Monitor(f"{folder}/{engine}", tensorboard=False, sinks=[sink])
        with monitor.watch(wrapped, optimizer):
            for step in range(STEPS):
                if engine == "differs":
                    model.layers[0].requires_grad_(rank == 0 or step not in (2, 3))
                else:
                    choose(model, badam if step in (2, 3) else lambda _, n: badam(0, n), step)
                    model.head.requires_grad_(True)
                (ids,) = batches(step, 2, 1)[rank]
                if engine.startswith("zero"):
                    wrapped.backward(wrapped(ids))
                    wrapped.step()
                    continue
                if engine == "differs" and step in (2, 3):
                    with wrapped.no_sync():  # DDP itself would wait for the other rank
                        wrapped(ids).backward()
                else:
                    wrapped(ids).backward()
                optimizer.step()
                optimizer.zero_grad()
        found[engine] = {
            "measured": [i + 1 for i, r in enumerate(merged(sink)) if "grad/norm/total" in r],
            "steps": [r.step for r in sink.records if "optim/lr/0" in r],
            "told": [dict(e.data) for e in sink.events if "parameters" in e.data],
        }
    return found


def trainable_only(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.fixture(scope="module")
def unfollowed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("unfollowed"))
    return spawn(train_what_cannot_be_followed, 2, args=[folder], timeout=240)[0]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("ddp", "the ranks have different gradients of the parameters that became trainable"),
        ("zero2", "parameter layers.2.weight became trainable after deepspeed.initialize"),
        ("zero3", "parameter layers.2.weight became trainable after deepspeed.initialize"),
        ("differs", "the ranks train different parameters"),
    ],
)
def test_a_change_that_cannot_be_followed_costs_its_steps_metrics_and_is_told_once(
    unfollowed: dict[str, Any], case: str, reason: str
) -> None:
    found = unfollowed[case]
    assert found["steps"] == [1, 2, 3, 4, 5, 6]
    assert found["measured"] == [1, 2, 5, 6]
    (told,) = found["told"]
    assert (told["parameters"], told["first_step"]) == ("not followed", 3)
    assert told["error"].startswith(reason)
