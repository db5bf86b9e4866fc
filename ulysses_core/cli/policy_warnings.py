"""What is doubtful about the policies of a config: found by arithmetic, and by the effect study."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ulysses_core.config import RunConfig
from ulysses_monitor.policies import Managed, make_policies

__all__ = ["doubts"]

_HEALTHY_NORM = 1.0
"""Of all gradients together, on the order of which healthy fine-tuning runs are."""

_NORMALIZED = ("adam", "lion", "adafactor", "lamb", "rmsprop", "adagrad")
"""In names of optimizers whose updates do not depend on the gradient's scale."""


def doubts(config: RunConfig, trained: int) -> Iterator[tuple[str, str]]:
    """Policies that will do nothing, or something else than their numbers seem to say.

    Args:
        config: whose policies.
        trained: number of trained parameters.

    Yields:
        A policy's name, and the doubt.
    """
    monitor = config.settings.monitor
    if not monitor.enabled or monitor.mode == "off":
        return
    for managed in make_policies(monitor.policies):
        for doubt in _doubts(managed, config, trained):
            yield managed.name, doubt


def _doubts(managed: Managed, config: RunConfig, trained: int) -> Iterator[str]:
    policy: Any = managed.policy
    # Of elements that are normal the mean size is sqrt(2 / pi) of the root of their mean square.
    healthy = _HEALTHY_NORM * math.sqrt(2 / math.pi / trained)
    below = getattr(policy, "below", None)
    if below is not None and not policy.relative and below > healthy and not _always(policy):
        yield (
            f"below {below:g} is always so: with {trained:,} trained parameters a healthy gradient "
            f"of norm 1 has a mean |g| of {healthy:.1g}; use relative: true, or adaptive"
        )
    above = getattr(policy, "above", None)
    if above is not None and above > 100 * healthy:
        norm = above * math.sqrt(trained * math.pi / 2)
        yield f"above {above:g} means a gradient norm of {norm:,.0f}: it will hardly ever act"
    if "add_noise" in managed.acts and not getattr(policy, "relative", False):
        std = policy.std if hasattr(policy, "std") else math.sqrt(policy.eta)
        if std * math.sqrt(trained) > _HEALTHY_NORM:
            yield (
                f"noise of {std:.3g} an element has a norm of {std * math.sqrt(trained):.3g}, "
                "more than a healthy gradient"
            )
    if "scale_each" in managed.acts and hasattr(policy, "factor") and _is_normalized(config):
        yield (
            "under Adam a factor that stays changes nothing, and one that comes and goes changes "
            "the step by its second moment"
        )
    if "clip_norm" in managed.acts and _clips(config) and hasattr(policy, "percentile"):
        yield "the Trainer clips after it: set max_grad_norm: 0 to leave clipping to the policy"


def _always(policy: Any) -> bool:
    return bool(getattr(policy, "always", False))


def _is_normalized(config: RunConfig) -> bool:
    name = str(config.training.get("optim", "adamw_torch")).lower()
    return any(part in name for part in _NORMALIZED)


def _clips(config: RunConfig) -> bool:
    return bool(config.training.get("max_grad_norm", 1.0))
