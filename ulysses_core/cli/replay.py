"""`ulysses replay`: shows what rules and policies would have done in a run."""

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

from ulysses_core.cli.tables import as_text, check_description, print_damage
from ulysses_monitor.common import formatting as fmt
from ulysses_monitor.diagnosis.checks import group_reasons
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

_MAX_ROWS = 50
"""Decisions or alerts to show without ``--all``."""

_MAX_VALUES = 2
"""Values of an action to show."""


@dataclass(frozen=True)
class _Result:
    """The decisions of policies or the alerts of rules.

    Attributes:
        source: ``policy`` or ``rule``.
        names: the names of the replayed policies or rules.
        events: decisions or alerts, in the order of steps.
        left_out: reasons why other policies were not replayed, or rules not checked, by name.
    """

    source: str
    names: list[str]
    events: list[dict[str, Any]]
    left_out: Mapping[str, str]

    @property
    def is_of_policies(self) -> bool:
        return self.source == "policy"

    @property
    def event_name(self) -> str:
        return "decision" if self.is_of_policies else "alert"

    def group_events(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the events by name; leaving out a non-finite step has a name of its own."""
        groups: dict[str, list[dict[str, Any]]] = {name: [] for name in self.names}
        for event in self.events:
            groups.setdefault(event[self.source], []).append(event)
        return groups

    def count_kinds(self, events: Iterable[Mapping[str, Any]]) -> Counter[str]:
        """Counts events by the kind of action, or by severity."""
        key = "action" if self.is_of_policies else "severity"
        return Counter(event[key] for event in events)


def replay(
    place: str,
    policies: Sequence[str],
    rules: Sequence[str],
    *,
    as_json: bool,
    show_all: bool,
) -> None:
    """Replays policies and rules on a run and prints their decisions and alerts.

    Args:
        place: the path or URL of the run.
        policies: names, presets, YAML files and import paths; modules in the current directory
            can be imported.
        rules: names, YAML files and import paths; if there are neither policies nor rules, the
            default rules.
        as_json: print a JSON object instead of tables.
        show_all: print all decisions and alerts, not only the first ones.

    Raises:
        InputError: there is no run, or a rule or policy is wrong, or a policy cannot act in it.
    """
    run = open_run(place)
    check_description(run)
    _import_from_here()
    steps = [int(step) for step in trained_steps(run)]
    results = [_replay_policies(run, policies, bool(steps))] if policies else []
    if rules or not policies:
        results.append(_replay_rules(run, rules or ["default"]))
    print_damage(run)
    if as_json:
        typer.echo(json.dumps(_as_json(run, steps, results), indent=2, allow_nan=False))
        return
    typer.echo(as_text(f"{run}: {_describe_steps(steps)}").plain)
    if steps:
        for result in results:
            _print_result(result, show_all)


def _replay_policies(run: RunReader, specs: Sequence[str], has_steps: bool) -> _Result:
    policies = make_policies([policy for spec in specs for policy in make_policies(spec)])
    if not has_steps:  # no policy would fit, which is not the policies' fault
        return _Result("policy", [policy.name for policy in policies], [], {})
    fit = fit_to_run(run, policies)
    events = [event_to_dict(event) for event in replay_policies(run, fit.policies)]
    return _Result("policy", [policy.name for policy in fit.policies], events, fit.left_out)


def _import_from_here() -> None:
    """Lets import paths name modules in the current directory."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _replay_rules(run: RunReader, specs: Sequence[str]) -> _Result:
    rules = make_rules([rule for spec in specs for rule in make_rules(spec)])
    found = replay_rules(run, rules)
    events = [event_to_dict(event) for event in found.events]
    names = [rule.name for rule in rules if rule.name not in found.unchecked]
    return _Result("rule", names, events, found.unchecked if found.steps else {})


def _describe_steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no steps were recorded, so there is nothing to replay"
    return f"{_count(len(steps), 'step')}, {steps[0]:,} to {steps[-1]:,}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


# -- JSON -------------------------------------------------------------------------------------


def _as_json(run: RunReader, steps: Sequence[int], results: Sequence[_Result]) -> dict[str, Any]:
    about = {
        "count": len(steps),
        "first": min(steps, default=None),
        "last": max(steps, default=None),
    }
    keys = {"policy": "policies", "rule": "rules"}
    by_source = {keys[result.source]: _result_as_json(result) for result in results}
    damaged = dict(run.damaged)
    return {"run": str(run), "damaged": damaged, "steps": about} | by_source


def _result_as_json(result: _Result) -> dict[str, Any]:
    summary = {
        name: {
            "count": len(events),
            "first": events[0]["step"] if events else None,
            "last": events[-1]["step"] if events else None,
            "kinds": dict(result.count_kinds(events)),
        }
        for name, events in result.group_events().items()
    }
    events = [{k: v for k, v in e.items() if k not in ("kind", "mode")} for e in result.events]
    left_out = {"left_out" if result.is_of_policies else "not_checked": dict(result.left_out)}
    return {"summary": summary, **left_out, f"{result.event_name}s": events}


# -- tables -----------------------------------------------------------------------------------


def _print_result(result: _Result, show_all: bool) -> None:
    typer.echo("")
    if result.names:
        _print_table(_make_summary(result))
    for name, reason in result.left_out.items() if result.is_of_policies else ():
        typer.echo(as_text(f"skipped {name}: {reason}").plain)
    for reason, names in () if result.is_of_policies else group_reasons(result.left_out).items():
        typer.echo(as_text(f"not checked ({reason}): {', '.join(names)}").plain)
    if not result.events:
        typer.echo(f"no {result.event_name}s")
        return
    shown = result.events if show_all else result.events[:_MAX_ROWS]
    typer.echo("")
    _print_table(_make_event_table(result, shown))
    if (hidden := len(result.events) - len(shown)) > 0:
        typer.echo(f"and {_count(hidden, result.event_name)} more; use --all to show them")


def _make_summary(result: _Result) -> Table:
    numbers = (f"{result.event_name}s", "first", "last")
    table = _make_table(result.source, *(f"{name}>" for name in numbers), "kinds")
    for name, events in result.group_events().items():
        first, last = (f"{events[i]['step']:,}" if events else fmt.DASH for i in (0, -1))
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in result.count_kinds(events).most_common())
        table.add_row(*map(as_text, (name, f"{len(events):,}", first, last, kinds)))
    return table


def _make_event_table(result: _Result, events: Sequence[Mapping[str, Any]]) -> Table:
    has_values = result.is_of_policies
    keys = ("policy", "action", "reason") if has_values else ("rule", "severity", "message")
    table = _make_table("step>", *keys[:2], *(["values"] if has_values else []), keys[2])
    for event in events:
        step, (name, kind, why) = f"{event['step']:,}", (str(event[key]) for key in keys)
        values = [_format_values(event["values"])] if has_values else []
        table.add_row(*map(as_text, (step, name, kind, *values, why)))
    return table


def _format_values(values: Mapping[str, Any]) -> str:
    shown = [f"{name} {fmt.tick(value)}" for name, value in list(values.items())[:_MAX_VALUES]]
    more = [f"{len(values) - _MAX_VALUES} more"] if len(values) > _MAX_VALUES else []
    return ", ".join(shown + more)


def _make_table(*names: str) -> Table:
    """Returns a table with these columns; names that end in ``>`` are aligned to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        right = name.endswith(">")
        table.add_column(name.rstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table


def _print_table(table: Table) -> None:
    console = Console()
    # Truncated text cannot be read, so a narrow terminal wraps lines.
    console.width = max(console.width, Console(width=10_000).measure(table).maximum)
    console.print(table, crop=False, soft_wrap=True)
