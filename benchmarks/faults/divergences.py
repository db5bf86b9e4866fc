"""Trainings that diverge slowly, each for another reason: something grows before the loss does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.faults.training import Training

__all__ = ["DIVERGENCES", "ONSET"]

ONSET = 80
"""Step at which the cause begins."""

DIVERGENCES: dict[str, Callable[[Training], None]] = {}


def _divergence(breaks: Callable[[Training], None]) -> Callable[[Training], None]:
    DIVERGENCES[breaks.__name__] = breaks
    return breaks


def _after_onset(training: Training, act: Callable[[int, Training], None]) -> None:
    def on_step(step: int, t: Training) -> None:
        if step >= ONSET:
            with torch.no_grad():
                act(step, t)

    training.on_step = on_step


def _named(training: Training, *parts: str) -> Iterator[Tensor]:
    for name, parameter in training.model.named_parameters():
        if any(part in name for part in parts) and name.endswith("weight"):
            yield parameter


def _grow(training: Training, factor: float, *parts: str) -> None:
    def grow(_: int, t: Training) -> None:
        for weight in _named(t, *parts):
            weight.mul_(factor)

    _after_onset(training, grow)


@_divergence
def rate_that_rises(training: Training) -> None:
    """A schedule that multiplies the rate and never lets it fall."""

    def rise(step: int, t: Training) -> None:
        for group in t.optimizer.param_groups:
            group["lr"] = t.setting.rate * 1.06 ** (step - ONSET)

    _after_onset(training, rise)


@_divergence
def queries_and_keys_that_grow(training: Training) -> None:
    """Attention logits that grow, until attention looks at one token alone."""
    _grow(training, 1.04, "q_proj", "k_proj")


@_divergence
def head_that_grows(training: Training) -> None:
    """Logits that grow, as they do without weight decay or a z-loss."""
    _grow(training, 1.03, "head")


@_divergence
def residual_that_grows(training: Training) -> None:
    """What one block adds to the residual stream grows."""

    def grow(_: int, t: Training) -> None:
        layer: Any = t.model.layers[1]  # type: ignore[index, union-attr]
        layer.scale *= 1.05

    _after_onset(training, grow)


@_divergence
def decay_with_the_wrong_sign(training: Training) -> None:
    """Weights that grow by a part of themselves at each step."""
    _grow(training, 1.02, "")


@_divergence
def one_channel_that_grows(training: Training) -> None:
    """An outlier: one channel of the residual stream, which every block reads."""

    def grow(_: int, t: Training) -> None:
        for weight in _named(t, "down_proj", "o_proj"):
            weight[3] *= 1.06

    _after_onset(training, grow)


@_divergence
def second_moment_that_forgets(training: Training) -> None:
    """Adam with a second moment of few steps, at a rate that rises."""
    training.optimizer_settings = {"betas": (0.9, 0.9)}

    def rise(step: int, t: Training) -> None:
        for group in t.optimizer.param_groups:
            group["lr"] = t.setting.rate * 1.05 ** (step - ONSET)

    _after_onset(training, rise)


@_divergence
def momentum_that_adds_up(training: Training) -> None:
    """A first moment that remembers ever longer, without a bias correction for it."""

    def rise(step: int, t: Training) -> None:
        beta = 1 - 0.1 * 0.94 ** (step - ONSET)
        for group in t.optimizer.param_groups:
            group["betas"] = (min(beta, 0.998), 0.999)
            group["lr"] = t.setting.rate * 1.03 ** (step - ONSET)

    _after_onset(training, rise)


@_divergence
def values_that_grow(training: Training) -> None:
    """The values of attention grow in every block."""
    _grow(training, 1.05, "v_proj")


@_divergence
def gains_that_grow(training: Training) -> None:
    """The gains of all norms grow, so that each block sees larger inputs."""

    def grow(_: int, t: Training) -> None:
        for module in t.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(1.03)

    _after_onset(training, grow)
