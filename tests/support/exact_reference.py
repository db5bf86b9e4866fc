"""Computes the metrics of a case by hand, on one process in float64.

At each step, the reference takes the weights with which the engine enters the step, and computes
the gradient of the batch of all ranks in float64. So an error of an earlier step neither hides nor
causes one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tests.support.exact_cases import MODELS, STEPS, Case, batches, optimizer_for

__all__ = ["family_of", "reference", "relative", "worst_errors"]

Named = dict[str, Tensor]


def reference(case: Case, weights: Sequence[Named], world: int) -> Iterator[dict[str, float]]:
    """Yields the metrics of each step.

    Args:
        case: what was trained.
        weights: the state dict before each step, and after the last.
        world: number of ranks.
    """
    model = MODELS[case.model]().double()
    optimizer = optimizer_for(
        model, case.optimizer if case.optimizer in ("adam", "sgd") else "adamw"
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if case.engine == "zero0" and case.bits != "fp32":
        # DeepSpeed creates the state by a step without gradients, which Adam counts as its first.
        for param in trained.values():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    # The rounding of a change is part of what the step did. It shows under bf16, and with SGD,
    # whose changes are small and found by subtracting a copy.
    rounds = (case.engine == "plain" and case.bits == "bf16") or case.optimizer == "sgd"
    for step in range(STEPS):
        before = {n: w.double() for n, w in weights[step].items()}
        model.load_state_dict(before)
        optimizer.zero_grad()
        every = batches(step, world, case.accumulate).flatten(0, 1)
        (sum(model(ids) for ids in every) / len(every)).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        metrics = gradient_metrics(grads)
        if step and case.optimizer != "sgd":
            metrics |= state_metrics(trained, optimizer)
        if world > 1 and not case.engine.startswith(("zero3", "fsdp")):
            metrics |= likeness(trained, gradients=not case.engine.startswith(("zero1", "zero2")))
        coefficient = min(1.0, (case.clip or math.inf) / (metrics["grad/norm/total"] + 1e-6))
        metrics["grad/clip_coef/total"] = coefficient
        if case.clip:
            grads = {n: g.clone() for n, g in grads.items()}
            for param in trained.values():
                if param.grad is not None:
                    param.grad.mul_(coefficient)
        optimizer.step()
        after = {n: weights[step + 1][n].double() if rounds else p for n, p in trained.items()}
        after = {n: p.detach().clone() for n, p in after.items()}
        model.load_state_dict(before)
        yield metrics | parameter_metrics(trained, after) | lora_metrics(model, grads, after)


def scopes(names: Sequence[str]) -> dict[str, list[str]]:
    found = {"total": list(names)} | {f"param/{n}": [n] for n in names}
    for name in names:
        if "layers." in name:
            layer = f"layer/{name.split('layers.')[1].split('.')[0]}"
            found[layer] = [*found.get(layer, []), name]
    return found


def gradient_metrics(grads: Named) -> dict[str, float]:
    out = {}
    for scope, names in scopes([*grads]).items():
        flat = torch.cat([grads[n].flatten() for n in names])
        out[f"grad/norm/{scope}"] = float(flat.norm())
        out[f"grad/abs_mean/{scope}"] = float(flat.abs().mean())
        out[f"grad/max/{scope}"] = float(flat.abs().max())
        out[f"grad/zero_frac/{scope}"] = float((flat == 0).double().mean())
        out[f"grad/nonfinite/{scope}"] = 0.0
    means = [float(g.abs().mean()) for g in grads.values()]
    return out | {"grad/abs_mean/tensor_mean": sum(means) / len(means)}


def parameter_metrics(before: Named, after: Named) -> dict[str, float]:
    out = {}
    for scope, names in scopes([*before]).items():
        size = norm(before[n].detach() for n in names)
        out[f"param/norm/{scope}"] = size
        moved = norm(after[n] - before[n].detach() for n in names)
        out[f"optim/update_ratio/{scope}"] = divide(moved, size)
    return out


def state_metrics(trained: Named, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Counts a parameter that never got a gradient as zeros, whether it has state or not."""
    out = {}
    for scope, names in scopes([*trained]).items():
        states = [optimizer.state.get(trained[n], {}) for n in names]
        out[f"optim/exp_avg_norm/{scope}"] = norm(s["exp_avg"] for s in states if s)
        seconds = [s["exp_avg_sq"].sum() for s in states if s]
        numel = sum(trained[n].numel() for n in names)
        out[f"optim/exp_avg_sq_mean/{scope}"] = float(sum(seconds)) / numel
    return out


def likeness(trained: Named, *, gradients: bool) -> dict[str, float]:
    kinds = ("param", "grad") if gradients else ("param",)
    found = {f"{kind}/mismatch/{scope}": 0.0 for kind in kinds for scope in scopes([*trained])}
    return found | {"param/odd_rank/total": math.nan}


def lora_metrics(model: torch.nn.Module, grads: Named, after: Named) -> dict[str, float]:
    """Uses dense products, which the project itself avoids."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    modules = dict(model.named_modules())
    columns: dict[str, list[float]] = {}
    out = {}
    adapters = {n.split(".lora_A.")[1].split(".")[0] for n in trained if ".lora_A." in n}
    for name_a in trained:
        if ".lora_A." not in name_a and ".lora_embedding_A." not in name_a:
            continue
        name_b = name_a.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        path, adapter = name_a.split(".lora_")[0], name_a.removesuffix(".weight").split(".")[-1]
        scope = f"{path}.{adapter}" if len(adapters) > 1 else path
        a, b = trained[name_a].detach(), trained[name_b].detach()
        delta = modules[path].scaling[adapter] * (b @ a)
        values = {
            "grad_ratio_B_A": divide(norm([grads[name_b]]), norm([grads[name_a]])),
            "update_ratio_A": divide(norm([after[name_a] - a]), norm([a])),
            "update_ratio_B": divide(norm([after[name_b] - b]), norm([b])),
            "delta_ratio": norm([delta]) / norm([modules[path].base_layer.weight]),
            "stable_rank": divide(
                norm([delta]) ** 2, float(torch.linalg.matrix_norm(delta, 2)) ** 2
            ),
        }
        for stat, value in values.items():
            out[f"lora/{stat}/module/{scope}"] = value
            columns.setdefault(stat, []).append(value)
    for stat, column in columns.items():
        known = [v for v in column if not math.isnan(v)]
        out[f"lora/{stat}/total"] = statistics.median(known) if known else math.nan
    return out


def norm(tensors: object) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))  # type: ignore[attr-defined]


def divide(a: float, b: float) -> float:
    return a / b if b else math.inf if a else math.nan


MEASURED = ("grad", "param", "optim", "lora")
"""Families of which every metric is compared, except those in `SET`."""
SET = tuple(
    f"optim/{name}/" for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum")
)
"""What the optimizer's groups set; nothing measures it."""


def worst_errors(
    records: list[dict[str, float]], expected: list[dict[str, float]]
) -> dict[str, float]:
    """Returns each family's worst relative error over parameters, layers, total and steps.

    The last step's update is not compared, because it would travel with the next step.
    """
    assert len(records) == len(expected)
    worst: dict[str, float] = {}
    for step, (record, truth) in enumerate(zip(records, expected, strict=True), start=1):
        if step == len(records):
            truth = {n: v for n, v in truth.items() if "update_ratio" not in n}
        names = {n for n in record if n.startswith(MEASURED) and not n.startswith(SET)}
        if "grad/carried/total" in names:  # from the second step on, where the engine allows it
            names.remove("grad/carried/total")
            assert record["grad/carried/total"] == 0.0  # each case clears its gradients
        assert names == truth.keys(), sorted(names ^ truth.keys())
        for name, value in truth.items():
            family = family_of(name)
            worst[family] = max(worst.get(family, 0.0), relative(record[name], value))
    return worst


def family_of(name: str) -> str:
    return "/".join(name.split("/")[:2])


def relative(got: float, truth: float) -> float:
    if got == truth or (math.isnan(got) and math.isnan(truth)):
        return 0.0
    if not (math.isfinite(got) and math.isfinite(truth)):
        return math.inf
    return abs(got - truth) / abs(truth) if truth else math.inf
