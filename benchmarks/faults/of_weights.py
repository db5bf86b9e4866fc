"""Faults of what is trained."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.faults.registry import BLOWN_UP, ONSET, fault
from benchmarks.faults.training import Training


def _layer(t: Training, index: int = 1) -> nn.Module:
    return t.model.layers[index]  # type: ignore[index, return-value, no-any-return, union-attr]


@fault("no_gradient", "vanishing_layer", fits=("adamw", "sgd"))
def layer_detached(training: Training) -> None:
    def cut(t: Training) -> None:
        _layer(t).is_cut = True  # type: ignore[assignment]

    training.built = cut


@fault("does_not_move")
def layer_not_in_the_optimizer(training: Training) -> None:
    def others(model: nn.Module) -> list[nn.Parameter]:
        named = model.named_parameters()
        return [p for n, p in named if p.requires_grad and "layers.1." not in n]

    training.trains = others


@fault("does_not_move")
def group_with_rate_zero(training: Training) -> None:
    def split(t: Training) -> None:
        group = t.optimizer.param_groups[0]
        still = group["params"][: len(group["params"]) // 2]
        group["params"] = group["params"][len(still) :]
        t.optimizer.add_param_group({"params": still, "lr": 0.0, "initial_lr": 0.0})

    training.built = split


@fault("lora_idle", fits=("lora",))
def adapters_both_zero(training: Training) -> None:
    def clear(t: Training) -> None:
        for name, parameter in t.model.named_parameters():
            if "lora_" in name:
                nn.init.zeros_(parameter)

    training.before_adapters = clear


@fault("lora_outgrows_base", *BLOWN_UP, fits=("lora",))
def alpha_times_100(training: Training) -> None:
    def scale(t: Training) -> None:
        for module in t.model.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["default"] *= 100

    training.before_adapters = scale


@fault("no_gradient", "lora_idle", fits=("lora",))
def adapters_behind_a_detach(training: Training) -> None:
    def cut(t: Training) -> None:
        for index in range(2):
            _layer(t, index).is_cut = True  # type: ignore[assignment]

    training.built = cut


@fault("weights_jump", "layer_shift", *BLOWN_UP, onset=ONSET)
def layer_reinitialised(training: Training) -> None:
    def damage(step: int, t: Training) -> None:
        if step == ONSET:
            with torch.no_grad():
                for parameter in _layer(t).parameters():
                    parameter.normal_(0, 0.5)

    training.on_step = damage


@fault("layer_shift", "no_gradient", "vanishing_layer", "loss_spike", onset=ONSET)
def layer_dead(training: Training) -> None:
    def kill(step: int, t: Training) -> None:
        if step == ONSET:
            _layer(t).scale = 0.0  # type: ignore[assignment]

    training.on_step = kill


@fault(*BLOWN_UP, onset=ONSET)
def residual_explodes(training: Training) -> None:
    def grow(step: int, t: Training) -> None:
        if step >= ONSET:
            _layer(t).scale *= 1.15  # type: ignore[operator, assignment]

    training.on_step = grow


@fault(*BLOWN_UP, onset=ONSET)
def logits_grow(training: Training) -> None:
    def grow(step: int, t: Training) -> None:
        if step >= ONSET:
            with torch.no_grad():
                t.model.head.weight *= 1.05  # type: ignore[operator, union-attr]

    training.on_step = grow
