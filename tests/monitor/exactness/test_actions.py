"""Actions act: the same weights under every engine as by hand on one process in float64.

The engine clips after them, by the norm that the action left; steps are SGD's and AdamW's.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exact_cases import MODELS, Case, batches
from exact_engines import whole_weights, wrap
from spawn import spawn
from torch import Tensor, nn

from ulysses_monitor.actions import GradientEditor, gaussian, key_of
from ulysses_monitor.engines import find_engine
from ulysses_monitor.records import Action

CLIP, LR, SEED, STEPS = 0.3, 0.1, 7, 3

ACTIONS: dict[str, list[dict[str, Any]]] = {
    "add_noise": [{"kind": "add_noise", "values": {"std": 0.01}, "targets": ("*weight",)}],
    "scale": [{"kind": "scale", "values": {"factor": 1.7}, "targets": ("layers.1.*", "gain")}],
    "scale_each": [{"kind": "scale_each", "values": {"head.weight": 0.2, "gain": 3.0}}],
    "centralize": [{"kind": "centralize"}],
    "clip_norm": [{"kind": "clip_norm", "values": {"max_norm": 0.05}, "targets": ("layers.*",)}],
    "clip_value": [{"kind": "clip_value", "values": {"limit": 0.003}}],
    "clip_rows": [{"kind": "clip_rows", "values": {"ratio": 0.01}}],
    "several": [
        {"kind": "centralize", "targets": ("*.weight",)},
        {"kind": "add_noise", "values": {"std": 0.02}},
        {"kind": "clip_norm", "values": {"max_norm": 0.2}},
        {"kind": "scale_each", "values": {"embed.weight": 2.0}},
    ],
}

ENGINES = [
    ("plain", "fp32", 1),
    ("plain", "amp", 1),
    ("ddp", "fp32", 2),
    ("zero0", "fp32", 2),
    ("zero1", "fp32", 2),
    ("zero1-offload", "fp32", 2),
    ("zero2", "fp32", 3),
    ("zero2-offload", "fp32", 2),
    ("zero3", "fp32", 3),
    ("zero3-offload", "fp32", 2),
    ("fsdp2", "fp32", 3),
    ("hsdp", "fp32", 4),
]

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=LR),
    # Large eps: where gradients are rounding errors, AdamW would make steps of full size of them.
    "adamw": lambda params: torch.optim.AdamW(params, lr=LR / 10, eps=1e-3, weight_decay=0.0),
}


def actions_of(name: str) -> list[Action]:
    return [Action(**settings) for settings in ACTIONS.get(name, [])]


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def train(engine_name: str, bits: str, optimizer_name: str, name: str) -> dict[str, Any]:
    """The weights at the end, and the norm after the actions at each step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    case = Case(engine=engine_name, bits=bits, clip=CLIP)
    model = MODELS["toy"]()
    wrapped, optimizer, scaler = wrap(model, case, lambda m: OPTIMIZERS[optimizer_name](trained(m)))
    engine = find_engine(wrapped, optimizer, scaler=scaler)
    editor, norms, step = GradientEditor(engine, SEED), [], 0

    def edit() -> None:
        norms.append(editor.apply(actions_of(name), step).norm)

    undo = engine.hook_step(edit, lambda _: None)
    for step in range(1, STEPS + 1):
        (ids,) = batches(step, world, 1)[rank]
        if engine_name.startswith("zero"):
            wrapped.backward(wrapped(ids))
            wrapped.step()
            continue
        undo()  # a plain loop clips before the step: here the edit comes first
        loss = wrapped(ids)
        (loss if scaler is None else scaler.scale(loss)).backward()
        edit()
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return {"weights": whole_weights(model), "norms": norms}


def train_all(cases: list[tuple[str, str, str, str]]) -> dict[str, Any]:
    if any(case[0].startswith("zero") for case in cases):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    results = {}
    for case in cases:
        try:
            results["/".join(case)] = train(*case)
        except Exception:  # noqa: BLE001 - the test of this case tells it; the others go on
            results["/".join(case)] = {"error": traceback.format_exc()}
    return results


# -- by hand ----------------------------------------------------------------------------------


def by_hand(world: int, optimizer_name: str, name: str) -> dict[str, Any]:
    model = MODELS["toy"]().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OPTIMIZERS[optimizer_name](trained(model))
    norms = []
    for step in range(1, STEPS + 1):
        every = batches(step, world, 1).flatten(0, 1)
        (sum(model(ids) for ids in every) / len(every)).backward()
        for action in actions_of(name):
            edit_by_hand(model, action, step)
        grads = [p.grad for p in trained(model) if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(grads)))
        nn.utils.clip_grad_norm_(trained(model), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {"before": before, "weights": dict(model.named_parameters()), "norms": norms}


def edit_by_hand(model: nn.Module, action: Action, step: int) -> None:
    import fnmatch

    chosen = {
        n: p
        for n, p in model.named_parameters()
        if p.grad is not None and any(fnmatch.fnmatchcase(n, t) for t in action.targets)
    }
    norm = torch.sqrt(sum((p.grad**2).sum() for p in chosen.values()))
    for n, p in chosen.items():
        g, v = p.grad, action.values
        if action.kind == "add_noise":
            noise = gaussian(key_of(SEED, step, n), 0, g.numel(), g.device)
            p.grad = g + v["std"] * noise.double().view_as(g)
        elif action.kind == "scale":
            p.grad = g * v["factor"]
        elif action.kind == "scale_each":
            p.grad = g * v.get(n, 1.0)
        elif action.kind == "clip_value":
            p.grad = g.clamp(-v["limit"], v["limit"])
        elif action.kind == "clip_norm":
            p.grad = g * min(1.0, v["max_norm"] / float(norm + 1e-6))
        elif action.kind == "centralize" and g.ndim > 1:
            p.grad = g - g.mean(dim=1, keepdim=True)
        elif action.kind == "clip_rows" and g.ndim > 1:
            most = v["ratio"] * p.detach().norm(dim=1, keepdim=True).clamp(min=1e-3)
            p.grad = g * (most / g.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)


# -- the comparison ---------------------------------------------------------------------------

CASES = [
    (engine, bits, world, optimizer, name)
    for engine, bits, world in ENGINES
    for optimizer in OPTIMIZERS
    for name in ACTIONS
    if optimizer == "sgd" or name == "several"  # AdamW hides a wrong scale
]


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for world in (1, 2, 3, 4):
        cases = [(e, b, o, n) for e, b, w, o, n in CASES if w == world]
        of_ranks = spawn(train_all, world, args=[cases], timeout=200)
        found |= {key: [rank[key] for rank in of_ranks] for key in of_ranks[0]}
    return found


@pytest.fixture(scope="module")
def truths() -> dict[tuple[int, str, str], dict[str, Any]]:
    worlds = {world for _, _, world in ENGINES}
    return {(w, o, n): by_hand(w, o, n) for w in worlds for o in OPTIMIZERS for n in ACTIONS}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "bits", "world", "optimizer", "name"), CASES, ids=lambda v: str(v)
)
def test_an_action_leads_to_the_weights_that_it_leads_to_by_hand(
    results: dict, truths: dict, engine: str, bits: str, world: int, optimizer: str, name: str
) -> None:
    truth = truths[world, optimizer, name]
    # Of the change, and the rounding of the float32 weights that carry it.
    bound, rounding = 1e-5, 1e-7
    for of_rank in results["/".join((engine, bits, optimizer, name))]:
        assert "error" not in of_rank, of_rank["error"]
        assert of_rank["norms"] == pytest.approx(truth["norms"], rel=1e-5)
        for param, weight in truth["weights"].items():
            before = truth["before"][param]
            moved = (weight.detach() - before).norm()
            error = (of_rank["weights"][param].double() - weight.detach()).norm()
            assert error <= bound * moved + rounding * before.norm(), (param, error / moved)


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_changes_the_training(truths: dict, name: str) -> None:
    """Otherwise the comparison above would show nothing."""
    nothing = by_hand(2, "sgd", "nothing")
    weights = truths[2, "sgd", name]["weights"]
    assert any((weights[n] - w).norm() > 1e-4 * w.norm() for n, w in nothing["weights"].items())
