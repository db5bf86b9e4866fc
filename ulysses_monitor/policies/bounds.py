"""How often and how long a policy acts: patience, hysteresis, cool-down, an upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ulysses_monitor.policies.base import BuiltinPolicy

__all__ = ["UNLIMITED", "BoundedPolicy"]

UNLIMITED = 1 << 53
"""More steps than any training has."""


@dataclass(kw_only=True)
class BoundedPolicy(BuiltinPolicy):
    """A policy that acts in spells: from the step where its condition holds until it is gone.

    One condition starts a spell, a weaker one continues it, so that a value which wavers around a
    threshold does not switch the policy on and off at every step.
    """

    patience: Annotated[int, Field(ge=1)] = 1
    """Consecutive steps for which the condition must hold before the policy acts."""
    longest: Annotated[int, Field(ge=1)] = 200
    """Most consecutive steps at which the policy acts."""
    cooldown: Annotated[int, Field(ge=0)] = 20
    """Steps for which the policy rests after acting for `longest` steps."""
    most: Annotated[int, Field(ge=1)] = UNLIMITED
    """Most steps of the run at which the policy acts."""

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return self.patience - 1

    def should_act(self, starts: bool, continues: bool, key: str = "spell") -> bool:
        """Tells whether to act at this step; call it once a step.

        Args:
            starts: whether the condition holds that starts a spell.
            continues: whether the weaker condition holds that continues one.
            key: where the memory keeps this spell, for a policy that has several.
        """
        spell = self.memory.setdefault(key, {"held": 0, "acted": 0, "rest": 0, "total": 0})
        if spell["acted"] >= self.longest and continues:
            spell |= {"acted": 0, "held": 0, "rest": self.cooldown}
        if spell["rest"]:
            spell["rest"] -= 1
            return False
        spell["held"] = spell["held"] + 1 if starts else 0
        if spell["total"] >= self.most:
            return False
        if spell["acted"]:
            if not continues:
                spell["acted"] = 0
                return False
        elif spell["held"] < self.patience:
            return False
        spell["acted"] += 1
        spell["total"] += 1
        return True
