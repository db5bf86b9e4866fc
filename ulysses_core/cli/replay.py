"""`ulysses replay`: what rules and policies would have said of a run, at which steps."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ulysses_core.cli.tables import plain
from ulysses_monitor.common import formatting as fmt
from ulysses_monitor.diagnosis.replay import (
    fit_to_run,
    replay_policies,
    replay_rules,
    trained_steps,
)
from ulysses_monitor.policies import make_policies
from ulysses_monitor.reading import RunReader, open_run
from ulysses_monitor.records.json_ready import event_to_dict
from ulysses_monitor.rules import make_rules

__all__ = ["replay"]

_SHOWN = 50
"""Decisions that are shown where not all are asked for."""

_NAMED = 2
"""Values of an action that are shown."""


@dataclass(frozen=True)
class _Said:
    """What policies, or rules, would have said.

    Attributes:
        what: ``policy`` or ``rule``.
        asked: their names.
        events: what they said, by step.
        left_out: why others were not asked, by their names.
    """

    what: str
    asked: list[str]
    events: list[dict[str, Any]]
    left_out: Mapping[str, str]

    @property
    def of_each(self) -> dict[str, list[dict[str, Any]]]:
        """What each said; a step that is not finite is answered by none of them."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.asked}
        for event in self.events:
            found.setdefault(event[self.what], []).append(event)
        return found

    def kinds(self, events: Iterable[Mapping[str, Any]]) -> Counter[str]:
        """How many of each kind of action, or severity."""
        return Counter(event["action" if self.what == "policy" else "severity"] for event in events)


def replay(
    place: str,
    policies: Sequence[str],
    rules: Sequence[str],
    *,
    as_json: bool,
    everything: bool,
) -> None:
    """Asks policies and rules about each step of a run, and prints what they say.

    Args:
        place: the run's.
        policies: names, presets, YAML files and import paths, which the current directory is part
            of.
        rules: likewise; the default ones if there are neither policies nor rules.
        as_json: one object for machines instead of tables.
        everything: all decisions, not only the first.

    Raises:
        InputError: there is no run, or a rule or policy is wrong, or a policy cannot act in it.
    """
    run = open_run(place)
    _import_from_here()
    steps = [int(step) for step in trained_steps(run)]
    said = [_policies(run, policies, bool(steps))] if policies else []
    if rules or not policies:
        said.append(_rules(run, rules or ["default"]))
    if as_json:
        typer.echo(json.dumps(_as_json(run, steps, said), indent=2, allow_nan=False))
        return
    typer.echo(plain(f"{run}: {_described(steps)}").plain)
    if steps:
        for each in said:
            _show(each, everything)


def _policies(run: RunReader, given: Sequence[str], any_steps: bool) -> _Said:
    asked = make_policies([policy for each in given for policy in make_policies(each)])
    if not any_steps:  # then no policy fits, and none is to blame
        return _Said("policy", [policy.name for policy in asked], [], {})
    fit = fit_to_run(run, asked)
    events = [event_to_dict(event) for event in replay_policies(run, fit.policies)]
    return _Said("policy", [policy.name for policy in fit.policies], events, fit.left_out)


def _import_from_here() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _rules(run: RunReader, given: Sequence[str]) -> _Said:
    rules = make_rules([rule for each in given for rule in make_rules(each)])
    events = [event_to_dict(event) for event in replay_rules(run, rules)]
    return _Said("rule", [rule.name for rule in rules], events, {})


def _described(steps: Sequence[int]) -> str:
    if not steps:
        return "no step was recorded, so there is nothing to replay"
    return f"{_count(len(steps), 'step')}, {steps[0]:,} to {steps[-1]:,}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


# -- for machines -----------------------------------------------------------------------------


def _as_json(run: RunReader, steps: Sequence[int], said: Sequence[_Said]) -> dict[str, Any]:
    about = {
        "count": len(steps),
        "first": min(steps, default=None),
        "last": max(steps, default=None),
    }
    names = {"policy": "policies", "rule": "rules"}
    return {"run": str(run), "steps": about} | {names[each.what]: _plainly(each) for each in said}


def _plainly(said: _Said) -> dict[str, Any]:
    each = {
        name: {
            "count": len(events),
            "first": events[0]["step"] if events else None,
            "last": events[-1]["step"] if events else None,
            "kinds": dict(said.kinds(events)),
        }
        for name, events in said.of_each.items()
    }
    what = "decisions" if said.what == "policy" else "alerts"
    kept = [{k: v for k, v in e.items() if k not in ("kind", "mode")} for e in said.events]
    return {"summary": each, "left_out": dict(said.left_out), what: kept}


# -- for people -------------------------------------------------------------------------------


def _show(said: _Said, everything: bool) -> None:
    typer.echo("")
    if said.asked:
        _print(_summary(said))
    for name, reason in said.left_out.items():
        typer.echo(plain(f"without {name}: {reason}").plain)
    what = "decision" if said.what == "policy" else "alert"
    if not said.events:
        typer.echo(f"no {what}s")
        return
    shown = said.events if everything else said.events[:_SHOWN]
    typer.echo("")
    _print(_table(said, shown))
    if len(shown) < len(said.events):
        typer.echo(f"and {_count(len(said.events) - len(shown), what)} more; --all shows them")


def _summary(said: _Said) -> Table:
    what = "decisions" if said.what == "policy" else "alerts"
    table = _columns(said.what, *(f"{name}>" for name in (what, "first", "last")), "kinds")
    for name, events in said.of_each.items():
        first, last = (f"{events[i]['step']:,}" if events else fmt.DASH for i in (0, -1))
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in said.kinds(events).most_common())
        table.add_row(*map(plain, (name, f"{len(events):,}", first, last, kinds)))
    return table


def _table(said: _Said, events: Sequence[Mapping[str, Any]]) -> Table:
    policies = said.what == "policy"
    keys = ("policy", "action", "reason") if policies else ("rule", "severity", "message")
    table = _columns("step>", *keys[:2], *(["values"] if policies else []), keys[2])
    for event in events:
        step, (name, kind, why) = f"{event['step']:,}", (str(event[key]) for key in keys)
        values = [_values(event["values"])] if policies else []
        table.add_row(*map(plain, (step, name, kind, *values, why)))
    return table


def _values(values: Mapping[str, Any]) -> str:
    shown = [f"{name} {fmt.tick(value)}" for name, value in list(values.items())[:_NAMED]]
    more = [f"{len(values) - _NAMED} more"] if len(values) > _NAMED else []
    return ", ".join(shown + more)


def _columns(*names: str) -> Table:
    """A table with these columns, of which those with ``>`` are aligned to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        right = name.endswith(">")
        table.add_column(name.rstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table


def _print(table: Table) -> None:
    console = Console()
    # What is cut cannot be read: a narrow terminal wraps the lines instead.
    console.width = max(console.width, Console(width=10_000).measure(table).maximum)
    console.print(table, crop=False, soft_wrap=True)
