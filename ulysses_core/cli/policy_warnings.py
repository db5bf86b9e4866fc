"""Warnings about the policies of a config, from arithmetic and from the effect study."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ulysses_core.config import RunConfig
from ulysses_monitor.policies import Managed, make_policies

__all__ = ["find_policy_warnings"]

_HEALTHY_NORM = 1.0
"""Order of magnitude of the total gradient norm in healthy fine-tuning runs."""

_NORMALIZING_OPTIMIZERS = ("adam", "lion", "adafactor", "lamb", "rmsprop", "adagrad")
"""Parts of the names of optimizers whose updates do not depend on the gradient's scale."""


def find_policy_warnings(config: RunConfig, trained_parameters: int) -> Iterator[tuple[str, str]]:
    """Finds policies that would have no effect, or not the effect that their settings suggest.

    Args:
        config: the config with the policies.
        trained_parameters: number of trained parameters.

    Yields:
        A policy's name and a warning.
    """
    monitor = config.settings.monitor
    if not monitor.enabled or monitor.mode == "off":
        return
    for managed in make_policies(monitor.policies):
        for warning in _find_warnings(managed, config, trained_parameters):
            yield managed.name, warning


def _find_warnings(managed: Managed, config: RunConfig, trained: int) -> Iterator[str]:
    policy: Any = managed.policy
    # The mean |x| of normally distributed elements is sqrt(2 / pi) times their root mean square.
    healthy = _HEALTHY_NORM * math.sqrt(2 / math.pi / trained)
    below = getattr(policy, "below", None)
    if below is not None and not policy.relative and below > healthy and not _is_always_on(policy):
        yield (
            f"below is {below:g}, so it always acts: with {trained:,} trained parameters a healthy "
            f"gradient of norm 1 has a mean |g| of {healthy:.1g}; use relative: true, or adaptive"
        )
    above = getattr(policy, "above", None)
    if above is not None and above > 100 * healthy:
        norm = above * math.sqrt(trained * math.pi / 2)
        yield f"above is {above:g}, which means a gradient norm of {norm:,.0f}; it rarely acts"
    if "add_noise" in managed.action_kinds and not getattr(policy, "relative", False):
        std = policy.std if hasattr(policy, "std") else math.sqrt(policy.eta)
        if std * math.sqrt(trained) > _HEALTHY_NORM:
            yield (
                f"noise with a standard deviation of {std:.3g} has a norm of "
                f"{std * math.sqrt(trained):.3g}, more than a healthy gradient"
            )
    if (
        "scale_each" in managed.action_kinds
        and hasattr(policy, "factor")
        and _has_normalizing_optimizer(config)
    ):
        yield (
            "under Adam a constant factor has no effect, and a changing factor acts only through "
            "the second moment"
        )
    if (
        "clip_norm" in managed.action_kinds
        and _trainer_clips(config)
        and hasattr(policy, "percentile")
    ):
        yield "the Trainer clips after the policy; set max_grad_norm: 0 to let only the policy clip"


def _is_always_on(policy: Any) -> bool:
    return bool(getattr(policy, "always", False))


def _has_normalizing_optimizer(config: RunConfig) -> bool:
    name = str(config.training.get("optim", "adamw_torch")).lower()
    return any(part in name for part in _NORMALIZING_OPTIMIZERS)


def _trainer_clips(config: RunConfig) -> bool:
    return bool(config.training.get("max_grad_norm", 1.0))
