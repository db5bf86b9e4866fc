"""A set of policies over one history: modes, failures, and what travels with a checkpoint."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.monitor.policies.policy_records import LOSS, NORM, lively, record
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies import Outcome, PolicySet, make_policies
from ulysses_monitor.policies.nonfinite import is_finite
from ulysses_monitor.records import Action, StepRecord


class Counts:
    """Says how many records it has seen, in this process and before."""

    def __init__(self, name: str = "counts") -> None:
        self.name, self.seen, self.asked = name, 0, 0

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        self.seen, self.asked = self.seen + 1, self.asked + 1
        yield Action(kind="clip_norm", values={"max_norm": float(self.seen)})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state["seen"])


class Breaks(Counts):
    """Raises at some of the steps that it is asked at, after it has asked for something."""

    def __init__(self, *steps: int) -> None:
        super().__init__("breaks")
        self.steps = steps

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        yield from super().decide(history)
        if history[-1].step in self.steps:
            raise ZeroDivisionError("at this step")


class Locked(Counts):
    """Cannot give its state."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.locked = False

    def state_dict(self) -> dict[str, Any]:
        if self.locked:
            raise RuntimeError("no state to be had")
        return super().state_dict()


def looks_back(history: Sequence[StepRecord]) -> list[Action]:
    """The number of records, and the first one's step."""
    values = {"steps_back": float(len(history)), "skip_steps": float(history[0].step)}
    return [Action(kind="roll_back", values=values)]


def records(count: int, first: int = 1) -> list[StepRecord]:
    return [record(step, {LOSS: 2.0, NORM: 1.0}) for step in range(first, first + count)]


def decisions(policies: PolicySet, given: Iterable[StepRecord]) -> list[list[Outcome]]:
    return [policies.decide(each) for each in given]


def who(found: list[list[Outcome]]) -> list[list[str]]:
    return [[decision.policy for decision in each] for each in found]


# -- asking -----------------------------------------------------------------------------------


def test_policies_are_asked_in_their_order_with_their_modes() -> None:
    given = ["agc", {"centralize": {"always": True, "mode": "shadow"}}, {"zclip": {"mode": "off"}}]
    found = decisions(PolicySet(make_policies(given), "active"), records(1))[0]
    assert [(d.policy, d.action.kind, d.mode) for d in found] == [
        ("agc", "clip_rows", "active"),
        ("centralize", "centralize", "shadow"),
    ]
    found = decisions(PolicySet(make_policies(given), "shadow"), records(1))[0]
    assert [(d.policy, d.mode) for d in found] == [
        ("agc", "shadow"),
        ("centralize", "shadow"),
    ]
    assert decisions(PolicySet(make_policies([{"agc": {}}]), "off"), records(1)) == [[]]


def test_a_mode_can_be_changed_for_one_or_for_all() -> None:
    counts = Counts()
    policies = PolicySet(make_policies([counts, "agc"]), "active")
    assert (bool(policies.enabled), policies.has_active) == (True, True)
    policies.set_mode("counts", "off")
    assert who(decisions(policies, records(2))) == [["agc"]] * 2
    assert counts.asked == 0
    policies.set_mode("*", "shadow")
    assert (bool(policies.enabled), policies.has_active) == (True, False)
    assert who(decisions(policies, records(1))) == [["counts", "agc"]]
    policies.set_mode("*", "off")
    assert (bool(policies.enabled), policies.has_active) == (False, False)
    assert decisions(policies, records(1)) == [[]]
    with pytest.raises(InputError, match=r"'count' is not in this run \(did you mean 'cou"):
        policies.set_mode("count", "off")
    with pytest.raises(InputError, match="allowed: none: the run has no policies"):
        PolicySet([], "active").set_mode("count", "off")


def test_a_policy_that_was_left_out_is_asked_no_more() -> None:
    policies = PolicySet(make_policies(["agc", Counts()]), "active")
    policies.leave_out(["agc"])
    assert who(decisions(policies, records(1))) == [["counts"]]
    assert policies.modes == {"counts": "active"}


def test_a_set_of_none_asks_nobody() -> None:
    policies = PolicySet([], "active")
    assert policies.enabled == []
    assert decisions(policies, records(1)) == [[]]


def test_the_history_is_as_long_as_one_of_the_policies_looks_back_and_no_longer() -> None:
    policies = PolicySet(make_policies([looks_back]), "active")
    found = decisions(policies, records(300))
    values = [dict(each[0].action.values) for each in found]
    assert values[9] == {"steps_back": 10.0, "skip_steps": 1.0}
    assert values[299] == {"steps_back": 256.0, "skip_steps": 45.0}
    own = PolicySet(make_policies(["agc", "zclip"]), "active")
    decisions(own, records(300))
    assert sum(len(rows) for _, rows in own.history_arrays()) == 1


def test_a_history_that_a_policy_spoils_is_whole_for_the_next() -> None:
    def spoils(history: Any) -> list[Action]:
        history[-1].values.setflags(write=False)
        return []

    policies = PolicySet(make_policies([spoils, looks_back]), "active")
    found = decisions(policies, records(3))
    assert found[-1][0].action.values["steps_back"] == 3.0


# -- what fails -------------------------------------------------------------------------------


def test_a_policy_that_raises_is_off_after_three_failures_and_costs_nobody_anything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    breaks, counts = Breaks(2, 4, 5, 6), Counts()
    policies = PolicySet(make_policies([breaks, counts]), "active")
    with caplog.at_level(logging.ERROR):
        found = decisions(policies, records(8))
    both, alone = ["breaks", "counts"], ["counts"]
    assert who(found) == [both, alone, both, alone, alone, alone, alone, alone]
    assert (breaks.asked, counts.asked) == (5, 8)
    assert [each[-1].action.values["max_norm"] for each in found] == [*range(1, 9)]
    assert caplog.text.count("policy breaks failed") == 1
    assert caplog.text.count("policy breaks is switched off") == 1
    assert "at this step" in caplog.text


@pytest.mark.parametrize("given", ["scale", [None], [{"kind": "scale"}], 3])
def test_an_answer_that_is_no_action_is_a_failure(
    given: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policies = PolicySet(make_policies([lambda _: given, "agc"]), "active")
    with caplog.at_level(logging.ERROR):
        assert who(decisions(policies, records(4))) == [["agc"]] * 4
    assert "policy <lambda> failed" in caplog.text
    assert caplog.text.count("policy <lambda> is switched off") == 1


@pytest.mark.parametrize("nothing", [None, [], ()])
def test_an_answer_that_is_nothing_is_no_failure(
    nothing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policies = PolicySet(make_policies([lambda _: nothing]), "active")
    assert decisions(policies, records(4)) == [[]] * 4
    assert not caplog.text


NOT_SOUND = [
    {LOSS: math.nan},
    {LOSS: math.inf},
    {LOSS: 2.0, "grad/nonfinite/total": 1.0},
    {"grad/nonfinite/total": 3.0},
]


@pytest.mark.parametrize("metrics", NOT_SOUND)
def test_policies_never_see_a_step_that_is_not_finite(metrics: dict[str, float]) -> None:
    counts = Counts()
    policies = PolicySet(make_policies([counts, looks_back]), "active")
    odd = record(2, metrics)
    assert not is_finite(odd)
    first, second, third = decisions(policies, [record(1, {}), odd, record(3, {LOSS: 1.0})])
    assert (len(first), counts.asked) == (2, 2)
    assert [(d.policy, d.action.kind, d.mode) for d in second] == [("nonfinite", "skip", "active")]
    assert third[1].action.values["steps_back"] == 2.0


def test_a_step_is_finite_unless_a_metric_says_otherwise() -> None:
    assert is_finite(record(1, {}))
    assert is_finite(record(1, {LOSS: 2.0, "grad/nonfinite/total": 0.0}))
    assert is_finite(record(1, {LOSS: 2.0, "grad/nonfinite/total": math.nan, NORM: math.inf}))


# -- what travels with a checkpoint -----------------------------------------------------------

MIXED = [
    "zclip",
    {"autoclip": {"mode": "shadow"}},
    {"skip_outliers": {"warmup": 5, "window": 20}},
    {"spike_escalation": {"warmup": 5, "snapshot_every": 7, "steps_back": 7}},
    {"gradient_noise": {"mode": "off"}},
    looks_back,
    "agc",
]


def mixed() -> PolicySet:
    return PolicySet(make_policies([*MIXED, Counts()]), "active")


def resumed(policies: PolicySet) -> PolicySet:
    """What goes on in another process."""
    state = json.loads(json.dumps(policies.state_dict()))
    history = [(tuple(names), rows.copy()) for names, rows in policies.history_arrays()]
    other = mixed()
    assert other.load(state, history) == []
    return other


@pytest.mark.parametrize("k", [0, 1, 5, 60, 111, 135, 199])
def test_whoever_resumes_decides_as_if_the_training_had_gone_on(k: int) -> None:
    stream = list(lively())
    policies = mixed()
    decisions(policies, stream[:k])
    policies.set_mode("agc", "off")
    other = resumed(policies)
    assert other.modes == policies.modes
    assert decisions(other, stream[k:]) == decisions(policies, stream[k:])


def test_the_history_comes_back_record_by_record() -> None:
    policies, other = (PolicySet(make_policies([looks_back]), "active") for _ in range(2))
    given = [
        record(1, {LOSS: 2.0}),
        record(2, {LOSS: 1.9, NORM: math.inf}),
        record(3, {LOSS: 1.8, NORM: math.nan}),
        record(4, {NORM: 1.0, LOSS: 1.7}),
        record(5, {}),
        record(6, {LOSS: 1.6}),
    ]
    decisions(policies, given)
    arrays = policies.history_arrays()
    assert [(names, len(rows)) for names, rows in arrays] == [
        ((LOSS,), 1),
        ((LOSS, NORM), 2),
        ((NORM, LOSS), 1),
        ((), 1),
        ((LOSS,), 1),
    ]
    other.load(policies.state_dict(), arrays)
    held = list(other._history)
    assert [type(r.step) for r in held] == [int] * 6
    for one, was in zip(held, given, strict=True):
        assert (one.step, one.time, one.schema.names) == (was.step, was.time, was.schema.names)
        np.testing.assert_array_equal(one.values, was.values)
    assert decisions(other, records(1, 7)) == decisions(policies, records(1, 7))


def test_failures_are_remembered() -> None:
    def resumed_breaks() -> PolicySet:
        return PolicySet(make_policies([Breaks(1, 2, 3, 4)]), "active")

    policies = resumed_breaks()
    decisions(policies, records(2))
    other = resumed_breaks()
    other.load(json.loads(json.dumps(policies.state_dict())), policies.history_arrays())
    assert who(decisions(other, [*records(1, 3), *records(1, 9)])) == [[], []]


def test_policies_that_a_checkpoint_says_nothing_of_begin_anew_and_are_named() -> None:
    old = PolicySet(make_policies([Counts("one"), Counts("left"), Counts("gone")]), "active")
    old.leave_out(["left"])
    decisions(old, records(3))
    new = PolicySet(make_policies([Counts("one"), Counts("two"), Counts("left")]), "shadow")
    assert new.load(old.state_dict(), old.history_arrays()) == ["two"]
    assert new.modes == {"one": "active", "two": "shadow", "left": "shadow"}
    (found,) = decisions(new, records(1, 4))
    assert [d.action.values["max_norm"] for d in found] == [4.0, 1.0, 1.0]


def test_a_policy_that_cannot_give_its_state_costs_the_checkpoint_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    locked, counts = Locked(), Counts()
    policies = PolicySet(make_policies([locked, counts]), "active")
    decisions(policies, records(2))
    locked.locked = True
    with caplog.at_level(logging.ERROR):
        state = policies.state_dict()
    assert state["states"] == {"counts": {"seen": 2}}
    assert "policy locked failed" in caplog.text
    other = PolicySet(make_policies([Locked(), Counts()]), "active")
    assert other.load(state, policies.history_arrays()) == []
    (found,) = decisions(other, records(1, 3))
    assert [d.action.values["max_norm"] for d in found] == [1.0, 3.0]


def test_a_state_under_the_name_of_a_policy_without_one_is_left_alone() -> None:
    old = PolicySet(make_policies([Counts("looks_back")]), "active")
    decisions(old, records(3))
    new = PolicySet(make_policies([looks_back]), "active")
    assert new.load(old.state_dict(), old.history_arrays()) == []
    assert who(decisions(new, records(1, 4))) == [["looks_back"]]


def test_a_set_for_another_training_begins_anew() -> None:
    managed = make_policies([Counts()])
    decisions(PolicySet(managed, "active"), records(3))
    (found,) = decisions(PolicySet(managed, "active"), records(1))
    assert found[0].action.values["max_norm"] == 1.0
