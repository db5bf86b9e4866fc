"""How often and how long a policy acts: patience, hysteresis, cool-down, an upper bound."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_monitor.policies.base import BuiltinPolicy, check_value

__all__ = ["BoundedPolicy"]

_FOREVER = 1 << 53


@dataclass(kw_only=True)
class BoundedPolicy(BuiltinPolicy):
    """A policy that acts in spells: from where its condition holds to where it has gone.

    What begins a spell and what keeps it going are told apart, so that a value which wavers about
    a threshold does not switch it at every step.
    """

    patience: int = 1
    """Steps in a row at which the condition must hold before it acts."""
    longest: int = 200
    """Steps in a row that it acts at most."""
    cooldown: int = 20
    """Steps that it rests after such a spell."""
    most: int = _FOREVER
    """Steps of the run that it acts at most."""

    def __post_init__(self) -> None:
        what = self.name or type(self).__name__
        for name in ("patience", "longest", "most"):
            check_value(what, name, getattr(self, name), 1, _FOREVER, whole=True)
        check_value(what, "cooldown", self.cooldown, 0, _FOREVER, whole=True)

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return self.patience - 1

    def should_act(self, begins: bool, goes_on: bool, key: str = "spell") -> bool:
        """Whether to act at this step; ask once a step.

        Args:
            begins: whether the condition holds that begins a spell.
            goes_on: whether the weaker one holds that keeps it going.
            key: of the memory, where a policy has several spells.
        """
        spell = self.memory.setdefault(key, {"held": 0, "acted": 0, "rest": 0, "total": 0})
        if spell["acted"] >= self.longest and goes_on:
            spell |= {"acted": 0, "held": 0, "rest": self.cooldown}
        if spell["rest"]:
            spell["rest"] -= 1
            return False
        spell["held"] = spell["held"] + 1 if begins else 0
        if spell["total"] >= self.most:
            return False
        if spell["acted"]:
            if not goes_on:
                spell["acted"] = 0
                return False
        elif spell["held"] < self.patience:
            return False
        spell["acted"] += 1
        spell["total"] += 1
        return True
