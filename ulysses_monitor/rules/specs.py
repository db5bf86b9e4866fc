"""Rules by name, as YAML configs and `Monitor` take them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ulysses_monitor.common.registry import Registry, distinct_names
from ulysses_monitor.common.yaml_lists import parse_list
from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.rules.base import Rule
from ulysses_monitor.rules.book import BOOK
from ulysses_monitor.rules.builtin import BuiltinRule
from ulysses_monitor.rules.expressions import Expression, is_expression

__all__ = ["PROFILES", "RULES", "check_rules", "default_rules", "make_rules"]

_EXPRESSION = "expression"

RULES: Mapping[str, Callable[..., Rule]] = {
    **{name: each.make for name, each in BOOK.items()},
    _EXPRESSION: Expression,
}
"""The project's own rules, and ``expression``, which is one of the user's."""

PROFILES = ("default", "strict")
"""Sets of rules that come with the package, a YAML file each; ``off`` is none."""


@dataclass(frozen=True)
class _Function:
    """A function of the history as a rule."""

    name: str
    check: Callable[[Sequence[StepRecord]], list[Alert]]


@functools.cache  # rules keep nothing, so that all trainings may share them
def _profile(name: str) -> Sequence[Rule]:
    file = resources.files("ulysses_monitor.rules") / "profiles" / f"{name}.yaml"
    specs = parse_list(file.read_text(encoding="utf-8"), "rules", name)
    return [_REGISTRY.make(spec) for spec in specs]


_REGISTRY: Registry[Rule] = Registry(
    word="rule",
    plural="rules",
    known=RULES,
    protocol=Rule,
    needs="name and check(history)",
    wrap=_Function,
    presets={
        **{name: functools.partial(_profile, name) for name in PROFILES},
        "off": list,
    },
)


def make_rules(specs: Any = "default") -> list[Rule]:
    """Makes rules from what a user names them by.

    Args:
        specs: ``default``, ``strict``, ``off``, an expression, the path of a YAML file with a list
            under ``rules``, or a list. Each entry of a list is a rule; a function of the history;
            the name of a rule; an expression, such as ``grad/norm/total > 3 * median(50) for 5``;
            an import path, ``package.module:name``; or a mapping of one of these to settings, such
            as ``{"loss_spike": {"sigmas": 4.0}}``.

    Raises:
        InputError: a name, a setting, an expression or an object is wrong.
    """
    entries = [_read_expression(spec) for spec, _ in _REGISTRY.expand(_as_list(specs))]
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
        InputError: a name, a setting, an expression or the form of an import path is wrong.
    """
    for spec, _ in _REGISTRY.expand(_as_list(specs)):
        _REGISTRY.check(_read_expression(spec))


def default_rules() -> list[Rule]:
    """Makes the rules that ``rules="default"`` means."""
    return make_rules()


def _as_list(specs: Any) -> Any:
    if isinstance(specs, Iterator):
        return list(specs)
    if is_expression(specs):
        return [specs]
    return "off" if specs is False else specs  # YAML reads off as false


def _read_expression(spec: Any) -> Any:
    """Turns an expression, alone or with settings, into the rule ``expression``."""
    if is_expression(spec):
        return {_EXPRESSION: {"when": spec}}
    if isinstance(spec, Mapping) and len(spec) == 1:
        key, given = next(iter(spec.items()))
        if is_expression(key) and (given is None or isinstance(given, Mapping)):
            return {_EXPRESSION: {"when": key, **(given or {})}}
    return spec
