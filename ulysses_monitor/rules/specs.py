"""Rules by name, as YAML configs and `Monitor` take them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ulysses_monitor.common.registry import Registry, distinct_names
from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.rules.base import Rule
from ulysses_monitor.rules.builtin import BuiltinRule
from ulysses_monitor.rules.sanity import NoLabels, NonFinite, ReplicaDrift
from ulysses_monitor.rules.trends import LoraImbalance, Spike, VanishingGradient

__all__ = ["RULES", "check_rules", "default_rules", "make_rules"]

RULES: Mapping[str, Callable[..., Rule]] = {
    "nonfinite": NonFinite,
    "no_labels": NoLabels,
    "replica_drift": ReplicaDrift,
    "loss_spike": functools.partial(Spike, metric="train/loss/total", name="loss_spike"),
    "gradient_spike": functools.partial(Spike, metric="grad/norm/total", name="gradient_spike"),
    "vanishing_gradient": VanishingGradient,
    "lora_imbalance": LoraImbalance,
}
"""The project's own rules; all of them together are ``default``."""


@dataclass(frozen=True)
class _Function:
    """A function of the history as a rule."""

    name: str
    check: Callable[[Sequence[StepRecord]], list[Alert]]


_REGISTRY: Registry[Rule] = Registry(
    word="rule",
    plural="rules",
    known=RULES,
    protocol=Rule,
    needs="name and check(history)",
    wrap=_Function,
    presets={"default": lambda: list(RULES), "off": list},
)


def make_rules(specs: Any = "default") -> list[Rule]:
    """Makes rules from what a user names them by.

    Args:
        specs: ``default``, ``off``, the path of a YAML file with a list under ``rules``, or a list.
            Each entry of a list is a rule; a function of the history; the name of a rule; an import
            path, ``package.module:name``; or a mapping of one of these names to settings, such as
            ``{"loss_spike": {"sigmas": 4.0}}``.

    Raises:
        InputError: a name, a setting or an object is wrong.
    """
    given = list(specs) if isinstance(specs, Iterator) else _off_is_a_word(specs)
    entries = [spec for spec, _ in _REGISTRY.expand(given)]
    rules = [_REGISTRY.make(spec) for spec in entries]
    names = distinct_names([rule.name for rule in rules])
    return [
        dataclasses.replace(rule, name=name)
        if isinstance(rule, BuiltinRule) and isinstance(spec, str | Mapping)
        else rule
        for spec, rule, name in zip(entries, rules, names, strict=True)
    ]


def check_rules(specs: Any) -> None:
    """Checks what `make_rules` would make, without importing what is the user's.

    Raises:
        InputError: a name, a setting or the form of an import path is wrong.
    """
    _REGISTRY.check_all(_off_is_a_word(specs))


def default_rules() -> list[Rule]:
    """Makes the rules that ``rules="default"`` means."""
    return make_rules()


def _off_is_a_word(specs: Any) -> Any:
    return "off" if specs is False else specs  # YAML reads off as false
