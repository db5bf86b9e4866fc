"""The interventions and the tasks each is tried on; no other file knows their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ulysses_monitor as um

__all__ = ["INTERVENTIONS", "Intervention"]

ALL = ("*",)
SMALL = ("healthy-*", "vanishing-*", "lora-low-lr")
"""Tasks for interventions that should help when gradients are small."""
LARGE = ("healthy-*", "spikes-*", "lora-high-lr", "late-*")
"""Tasks for interventions that should help when they are large."""


@dataclass(frozen=True)
class Intervention:
    """Policies that act together.

    Attributes:
        policies: as `ulysses_monitor.Monitor` takes them, JSON-ready; a function is named by its
            import path.
        tasks: shell-style patterns of the tasks they go to. The healthy ones get everything: what
            helps elsewhere must not hurt there.
    """

    policies: Sequence[Any]
    tasks: tuple[str, ...] = ALL

    def goes_to(self, task: str) -> bool:
        """Whether it is tried on a task."""
        return any(fnmatch.fnmatch(task, pattern) for pattern in self.tasks)


def times_1_5(history: Sequence[um.StepRecord]) -> Iterable[um.Action]:
    """Multiplies all gradients by 1.5 at every step."""
    del history
    yield um.Action(kind="scale", values={"factor": 1.5}, reason="uniform scaling")


def times_100(history: Sequence[um.StepRecord]) -> Iterable[um.Action]:
    """Multiplies all gradients by 100 at every step."""
    del history
    yield um.Action(kind="scale", values={"factor": 100.0}, reason="uniform scaling")


INTERVENTIONS: Mapping[str, Intervention] = {
    "adaptive": Intervention(["adaptive"]),
    "ulysses-pro": Intervention(["ulysses-pro"]),
    "ulysses-pro-2025-03": Intervention(["ulysses-pro-2025-03"]),
    "gradient_noise": Intervention(["gradient_noise"], SMALL),
    "annealed_noise": Intervention(["annealed_noise"], (*SMALL, "late-*")),
    "scale_small": Intervention(["scale_small"], SMALL),
    "lr_boost": Intervention(["lr_boost"], SMALL),
    "centralize always": Intervention([{"centralize": {"always": True}}], (*SMALL, "late-*")),
    "clip_threshold": Intervention(["clip_threshold"], LARGE),
    "autoclip": Intervention(["autoclip"], LARGE),
    "zclip": Intervention(["zclip"], LARGE),
    "adagc": Intervention(["adagc"], LARGE),
    "agc": Intervention(["agc"], LARGE),
    "skip_outliers": Intervention(["skip_outliers"], LARGE),
    "spike_escalation": Intervention(["spike_escalation"], LARGE),
    "lora_balance": Intervention(["lora_balance"], ("*lora*",)),
    "warmup_cosine": Intervention(["warmup_cosine"], ("late-*",)),
    "scaling x1.5": Intervention(["benchmarks.policy_study.interventions:times_1_5"], SMALL),
    "scaling x100": Intervention(["benchmarks.policy_study.interventions:times_100"], SMALL),
}
"""By name."""
