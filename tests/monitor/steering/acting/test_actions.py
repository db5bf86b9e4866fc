"""Actions act: the same weights under every engine as by hand on one process in float64.

The engine clips after them, by the norm that the action left; steps are SGD's and AdamW's.
"""

from __future__ import annotations

import copy
import fnmatch
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ulysses_monitor as um
from tests.support.exact_cases import MODELS, Case, batches
from tests.support.exact_engines import plain_step, whole_weights, wrap
from tests.support.spawn import spawn
from ulysses_monitor.records import Action
from ulysses_monitor.steering.acting import gaussian, noise_key

CLIP, LR, SEED, STEPS = 0.3, 0.1, 7, 4

ACTIONS: dict[str, list[dict[str, Any]]] = {
    "add_noise": [{"kind": "add_noise", "values": {"std": 0.01}, "targets": ("*weight",)}],
    "scale": [{"kind": "scale", "values": {"factor": 1.7}, "targets": ("layers.1.*", "gain")}],
    "scale_each": [{"kind": "scale_each", "values": {"head.weight": 0.2, "gain": 3.0}}],
    "centralize": [{"kind": "centralize"}],
    "clip_norm": [{"kind": "clip_norm", "values": {"max_norm": 0.05}, "targets": ("layers.*",)}],
    "clip_value": [{"kind": "clip_value", "values": {"limit": 0.003}}],
    "clip_rows": [{"kind": "clip_rows", "values": {"ratio": 0.01}}],
    "clip_each": [{"kind": "clip_each", "values": {"head.weight": 0.02, "gain": 0.01}}],
    "freeze": [{"kind": "freeze", "targets": ("layers.1.*", "gain", "head.bias")}],
    "lr_factor": [{"kind": "lr_factor", "values": {"factor": 1.7, "group": 1}}],
    "skip": [{"kind": "skip", "step": 2}],
    "roll_back": [
        {"kind": "snapshot", "step": 2},
        {"kind": "roll_back", "values": {"steps_back": 0, "skip_steps": 0}, "step": 3},
        {"kind": "add_noise", "values": {"std": 0.01}},
    ],
    "balance_lora": [{"kind": "balance_lora", "values": {"share": 0.5}}],
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


def two_groups(params: list[Tensor], lr: float) -> list[dict[str, Any]]:
    """DeepSpeed steps each by itself."""
    half = len(params) // 2
    return [{"params": params[:half], "lr": lr}, {"params": params[half:], "lr": lr / 2}]


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(two_groups(params, LR), momentum=0.9),
    # Large eps: where gradients are rounding errors, AdamW would make steps of full size of them.
    "adamw": lambda params: torch.optim.AdamW(
        two_groups(params, LR / 10), eps=1e-3, weight_decay=0.0
    ),
}


def actions_of(name: str, step: int) -> list[Action]:
    """Entries with a step are for that step alone."""
    every = [dict(settings) for settings in ACTIONS.get(name, [])]
    return [Action(**each) for each in every if each.pop("step", step) == step]


def model_of(name: str) -> nn.Module:
    return MODELS["lora" if name == "balance_lora" else "toy"]()


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def train(engine_name: str, bits: str, optimizer_name: str, name: str) -> dict[str, Any]:
    """The weights at the end, and the norm after the actions at each step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    case = Case(engine=engine_name, bits=bits, clip=CLIP)
    model = model_of(name)
    wrapped, optimizer, scaler = wrap(model, case, lambda m: OPTIMIZERS[optimizer_name](trained(m)))
    sink = um.MemorySink()

    def decide(history: Sequence[um.StepRecord]) -> list[Action]:
        return actions_of(name, history[-1].step)

    with tempfile.TemporaryDirectory() as folder:
        monitor = um.Monitor(
            f"{folder}/run", policies=[decide], sinks=[sink], rules=[], tensorboard=False, seed=SEED
        )
        with monitor.watch(wrapped, optimizer, scaler=scaler):
            for step in range(1, STEPS + 1):
                mine = batches(step, world, 1)[rank]
                if engine_name.startswith("zero"):
                    wrapped.backward(wrapped(mine[0]))
                    wrapped.step()
                else:
                    # In full precision also with a scaler: what is tested is its scale.
                    plain_step(wrapped, optimizer, scaler, mine, case, monitor, half=False)
    edited = {e.step: e.data["norm_after"] for e in sink.events if e.kind == "action"}
    return {"weights": whole_weights(model), "norms": edited}


def train_all(cases: list[tuple[str, str, str, str]]) -> dict[str, Any]:
    if any(case[0].startswith("zero") for case in cases):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    results = {}
    for case in cases:
        try:
            results["/".join(case)] = train(*case)
        except Exception:  # noqa: BLE001 - the test of this case reports it
            results["/".join(case)] = {"error": traceback.format_exc()}
    return results


# -- by hand ----------------------------------------------------------------------------------


def by_hand(world: int, optimizer_name: str, name: str, *, acts: bool = True) -> dict[str, Any]:
    model = model_of(name).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OPTIMIZERS[optimizer_name](trained(model))
    norms, kept = {}, None
    for step in range(1, STEPS + 1):
        every = batches(step, world, 1).flatten(0, 1)
        (sum(model(ids) for ids in every) / len(every)).backward()
        actions = {action.kind: action for action in actions_of(name, step) if acts}
        if "snapshot" in actions:
            kept = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        left_out = {"skip", "roll_back"} & set(actions)
        for action in () if left_out else actions.values():
            EDITS_BY_HAND.get(action.kind, nothing)(model, action, step)
        grads = [p.grad for p in trained(model) if p.grad is not None]
        norms[step] = float(nn.utils.get_total_norm(grads))
        nn.utils.clip_grad_norm_(trained(model), CLIP)
        if "roll_back" in actions:
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
        elif not left_out:
            factor = actions["lr_factor"].values["factor"] if "lr_factor" in actions else 1.0
            optimizer.param_groups[1]["lr"] *= factor
            optimizer.step()
            optimizer.param_groups[1]["lr"] /= factor
        optimizer.zero_grad()
    return {"before": before, "weights": dict(model.named_parameters()), "norms": norms}


def chosen(model: nn.Module, action: Action) -> dict[str, nn.Parameter]:
    return {
        n: p
        for n, p in model.named_parameters()
        if p.grad is not None and any(fnmatch.fnmatchcase(n, t) for t in action.targets)
    }


def each_by_hand(change: Callable[..., Tensor]) -> Callable[[nn.Module, Action, int], None]:
    """`change(gradient, weights, values, name, step)` of every target."""

    def edit(model: nn.Module, action: Action, step: int) -> None:
        for n, p in chosen(model, action).items():
            p.grad = change(p.grad, p.detach(), action.values, n, step)

    return edit


def nothing(*_: Any) -> None: ...


def noise_by_hand(g: Tensor, _: Tensor, v: Any, n: str, step: int) -> Tensor:
    noise = gaussian(noise_key(SEED, step, n), 0, g.numel(), g.device)
    return g + v["std"] * noise.double().view_as(g)


def centralized(g: Tensor, *_: Any) -> Tensor:
    return g - g.mean(dim=1, keepdim=True) if g.ndim > 1 else g


def rows_clipped(g: Tensor, weights: Tensor, v: Any, *_: Any) -> Tensor:
    if g.ndim < 2:
        return g
    most = v["ratio"] * weights.norm(dim=1, keepdim=True).clamp(min=1e-3)
    return g * (most / g.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)


def freeze_by_hand(model: nn.Module, action: Action, _: int) -> None:
    for p in chosen(model, action).values():
        p.grad = None


def clip_norm_by_hand(model: nn.Module, action: Action, _: int) -> None:
    targets = chosen(model, action).values()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in targets))
    for p in targets:
        p.grad = p.grad * min(1.0, action.values["max_norm"] / float(norm + 1e-6))


def balance_by_hand(model: nn.Module, action: Action, _: int) -> None:
    params, share = chosen(model, action), action.values["share"]
    for n, a in params.items():
        if "lora_A" in n:
            pair = (a, params[n.replace("lora_A", "lora_B")])
            small, large = sorted(pair, key=lambda each: each.grad.norm())
            if small.grad.norm() < share * large.grad.norm():
                small.grad = small.grad * (share * large.grad.norm() / small.grad.norm())


EDITS_BY_HAND: dict[str, Callable[[nn.Module, Action, int], None]] = {
    "add_noise": each_by_hand(noise_by_hand),
    "balance_lora": balance_by_hand,
    "centralize": each_by_hand(centralized),
    "clip_each": each_by_hand(lambda g, _, v, n, __: g * min(1.0, v.get(n, 1e9) / float(g.norm()))),
    "clip_norm": clip_norm_by_hand,
    "clip_rows": each_by_hand(rows_clipped),
    "clip_value": each_by_hand(lambda g, _, v, *__: g.clamp(-v["limit"], v["limit"])),
    "freeze": freeze_by_hand,
    "scale": each_by_hand(lambda g, _, v, *__: g * v["factor"]),
    "scale_each": each_by_hand(lambda g, _, v, n, __: g * v.get(n, 1.0)),
}


# -- the comparison ---------------------------------------------------------------------------

WITH_ADAMW = ("several", "add_noise", "freeze", "lr_factor", "skip", "roll_back")
"""It hides a wrong scale, but not a wrong state."""

CASES = [
    (engine, bits, world, optimizer, name)
    for engine, bits, world in ENGINES
    for optimizer in OPTIMIZERS
    for name in ACTIONS
    if optimizer == "sgd" or name in WITH_ADAMW
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
def test_an_action_gives_the_same_weights_as_the_edit_made_by_hand(
    results: dict, truths: dict, engine: str, bits: str, world: int, optimizer: str, name: str
) -> None:
    truth = truths[world, optimizer, name]
    # Of the change, and of the weights; float32 carries them.
    bound, of_weights = 1e-5, 1e-6
    for rank, of_rank in enumerate(results["/".join((engine, bits, optimizer, name))]):
        assert "error" not in of_rank, of_rank["error"]
        assert of_rank["norms"] or rank
        for step, norm in of_rank["norms"].items():
            assert norm == pytest.approx(truth["norms"][step], rel=1e-5)
        for param, weight in truth["weights"].items():
            before = truth["before"][param]
            moved = (weight.detach() - before).norm()
            error = (of_rank["weights"][param].double() - weight.detach()).norm()
            assert error <= bound * moved + 1e-7 * before.norm(), (param, error / moved)
            assert error <= of_weights * weight.norm(), (param, error / weight.norm())


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_changes_the_training(truths: dict, name: str) -> None:
    """Otherwise the comparison above would show nothing."""
    weights = truths[2, "sgd", name]["weights"]
    model = "balance_lora" if name == "balance_lora" else "nothing"
    plain = by_hand(2, "sgd", model, acts=False)["weights"]
    assert any((weights[n] - w).norm() > 1e-4 * w.norm() for n, w in plain.items())
