"""Replays policies and rules on a recorded run, step by step; nothing is written.

Policies are pure functions of the history, and the run store keeps what they saw: float32 values,
of which those known before a step is done are put together again here. So for a run in shadow mode,
the same policies decide what its ``events.jsonl`` says. What can differ, and why:

- While policies are active, ``grad/clip_coef/total`` and ``optim/lr/*`` are recorded as they are
  after the policies acted.
- Policies that were off for a time, because a person or an error switched them off, are asked.
- A step that was decided and not finished, as in a crash, left no record. If a step was trained
  twice, the later training counts, and the earlier one for metrics that the later lacks.
- `StepRecord.time` is the time of the last thing recorded of the step; policies must not use time.
- The answer to a step that is not finite used float64: here a count of elements above 2**24 is
  rounded, and a loss that float32 cannot hold is infinite.
- The names of a record may come in another order if a run was resumed with other metrics.
- Policies never see metrics that a user added with `Monitor.log`. They are recognised by position:
  names outside the project's families count as logged if they come after the first step's own
  names, or if a step has them that was not trained. A source added in the middle of a run looks the
  same and is left out.

Rules see a step in float64 while it trains, and in float32 here: a value within 1e-7 of a threshold
may lie on its other side, a number in a message may be rounded differently, and what float32 cannot
hold is infinite. They start without history at each start of the run, as in a new process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ulysses_monitor.diagnosis.recorded_steps import (
    TRAINED,
    MetricTimes,
    RecordMaker,
    Start,
    Starts,
    read_trained,
    trained_steps,
)
from ulysses_monitor.policies import (
    POLICIES,
    BuiltinPolicy,
    Fit,
    Managed,
    PolicySet,
    fit_policies,
    make_policies,
    policy_view,
)
from ulysses_monitor.reading import RunReader
from ulysses_monitor.records import Event
from ulysses_monitor.rules import RuleSet, make_rules

__all__ = ["RuleReplay", "fit_to_run", "replay_policies", "replay_rules", "trained_steps"]

_KINDS = frozenset(POLICIES.values())
"""Policies that say which metrics they read."""


def replay_policies(run: RunReader, policies: str | Sequence[Any]) -> list[Event]:
    """Returns what `policies` would have decided in shadow mode from the start of a run.

    They are asked as in a training, except that policies which contradict one another may be asked
    together. Only the metrics they need are read; all of them if a policy is the user's own.

    Args:
        run: a finished or a live run.
        policies: see `make_policies`.

    Returns:
        An event of kind ``action`` for each decision, as the run would have recorded it, with the
        time of its step.

    Raises:
        InputError: a policy is wrong, or one that was named cannot act in this run.
    """
    if not len(trained_steps(run)):
        make_policies(policies)
        return []
    asked = fit_to_run(run, policies).policies
    if not asked:
        return []
    starts, names = Starts.of(run), run.names(*_patterns(run, asked))
    maker = RecordMaker(MetricTimes.of(run).before_end)
    events: list[Event] = []
    policy_set, now = PolicySet(asked, "shadow"), None
    for block in read_trained(run, frozenset(names)):
        for i, record in zip(starts.of_steps(block.steps), maker.make(block), strict=True):
            if i != now and now is not None:
                policy_set = _resume(policy_set, asked, starts.found[i])
            now = i
            outcomes = policy_set.decide(policy_view(record, starts.max_steps(i)))
            events += [outcome.to_event(record.step, record.time) for outcome in outcomes]
    for policy in asked:  # the user's own objects remember no more than before
        policy.reset()
    return events


@dataclass(frozen=True)
class RuleReplay:
    """What rules said of a run.

    Attributes:
        events: an event of kind ``alert`` for each alert, with the time of its step.
        unchecked: the rules that could not be checked at any start of the run, and why.
        steps: the steps that rules saw.
    """

    events: list[Event]
    unchecked: Mapping[str, str]
    steps: int


def replay_rules(run: RunReader, rules: str | Iterable[Any]) -> RuleReplay:
    """Returns the alerts that `rules` would have raised, and which could not be checked.

    Args:
        run: a finished or a live run.
        rules: see `make_rules`.

    Raises:
        InputError: a rule is wrong.
    """
    checked, metrics, starts = make_rules(rules), MetricTimes.of(run), Starts.of(run)
    known = RecordMaker(metrics.before_end | metrics.at_end)
    logged, late = RecordMaker(metrics.logged), RecordMaker(metrics.of_update)
    events: list[Event] = []
    rule_set, now, steps = RuleSet(checked), None, 0
    unchecked: list[dict[str, str]] = []
    for block in read_trained(run, frozenset(run.names())) if checked else ():
        which = starts.of_steps(block.steps)
        steps += len(which)
        made = (maker.make(block) for maker in (known, logged, late))
        for i, step, *later in zip(which, *made, strict=True):
            if i != now and now is not None:
                unchecked.append(rule_set.unchecked())
                rule_set = RuleSet(checked)
            now = i
            for record in (step, *(record for record in later if record.schema.names)):
                events += [alert.to_event(record.time) for alert in rule_set.observe(record)]
    return RuleReplay(events, _in_all([*unchecked, rule_set.unchecked()]), steps)


def _in_all(unchecked: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Returns the rules that could be checked at no start, with the reason of the longest one.

    Args:
        unchecked: of each start; the fewer rules it could not check, the more steps it had.
    """
    fewest = min(unchecked, key=len)
    return {name: why for name, why in fewest.items() if all(name in each for each in unchecked)}


def fit_to_run(run: RunReader, policies: str | Sequence[Any]) -> Fit:
    """Leaves out policies that are off, and of presets those that cannot act in this run.

    Args:
        run: its metrics and its number of steps count.
        policies: see `make_policies`.

    Raises:
        InputError: a policy is wrong, or one that the user named cannot act.
    """
    made = make_policies(policies)
    metrics, max_steps = _collected(MetricTimes.of(run).before_end), Starts.of(run).largest_plan
    enabled = [policy for policy in made if policy.mode != "off"]
    fit = fit_policies(enabled, metrics, max_steps, ("save", "stop"))
    fit.left_out.update({p.name: "its mode is off" for p in made if p.mode == "off"})
    return Fit([_without_memory(policy) for policy in fit.policies], fit.left_out)


def _collected(names: frozenset[str]) -> frozenset[str]:
    """Adds Adam's moments, which a training looks for even if its optimizer has none (yet)."""
    scopes = [name.removeprefix("grad/norm") for name in names if name.startswith("grad/norm/")]
    moments = ("optim/exp_avg_norm", "optim/exp_avg_sq_mean")
    return names | {stat + scope for stat in moments for scope in scopes}


def _without_memory(policy: Managed) -> Managed:
    """Returns one of the project's own policies without what a training taught it."""
    if type(policy.policy) not in _KINDS:
        return policy
    assert isinstance(policy.policy, BuiltinPolicy)  # noqa: S101 - as all of them
    return dataclasses.replace(policy, policy=dataclasses.replace(policy.policy))


def _patterns(run: RunReader, policies: Sequence[Managed]) -> list[str]:
    """Returns patterns of the metrics to read; none, which means all, if a policy names none."""
    if not all(type(policy.policy) in _KINDS for policy in policies):
        return []
    patterns = {pattern for policy in policies for pattern in policy.needed_metrics}
    # A policy that goes by a total names modules in what it says it has read.
    modules = {p.removesuffix("total") + "module/*" for p in patterns if p.startswith("lora/")}
    not_finite = run.block("grad/nonfinite/total", missing="ignore").values > 0
    where = ["grad/nonfinite/param/*"] if not_finite.any() else []
    return [*TRAINED, "grad/nonfinite/total", *where, *sorted(patterns | modules)]


def _resume(policies: PolicySet, managed: Sequence[Managed], start: Start) -> PolicySet:
    """Returns the policies after a resume: with their memory unless the run says otherwise."""
    if start.without_memory and start.without_memory >= start.policies:
        return PolicySet(managed, "shadow")
    for policy in managed:
        if policy.name in start.without_memory:
            policy.reset()
    return policies
