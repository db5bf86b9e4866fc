"""The contract of every policy, named or in a preset."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.monitor.policies.policy_records import TENSORS, flat, lively, record
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies import POLICIES, PRESETS, Managed, PolicySet, make_policies
from ulysses_monitor.policies.base import HISTORY, MAX_STEPS, BuiltinPolicy
from ulysses_monitor.records import Action, StepRecord

NEEDED: dict[str, dict[str, Any]] = {"freeze": {"targets": ["*norm*"], "begin": 0.2, "end": 0.9}}
"""Settings that a policy requires."""

OTHERS: dict[str, dict[str, Any]] = {
    "adagc: short": {"adagc": {"warmup": 20}},
    "autoclip: narrow": {"autoclip": {"window": 20, "late": {"window": 12}}},
    "centralize: always": {"centralize": {"always": True}},
    "freeze: steps": {"freeze": {"targets": ["*"], "begin": 3, "end": 9}},
    "gradient_noise: relative": {"gradient_noise": {"relative": True, "below": 0.2}},
    "lora_balance: late": {"lora_balance": {"patience": 2, "late": {"share": 0.9}}},
    "lr_boost: bounded": {"lr_boost": {"longest": 7, "cooldown": 3, "patience": 2, "most": 20}},
    "lr_boost: late": {"lr_boost": {"late": "off", "late_start": 0.3}},
    "scale_small: relative": {"scale_small": {"relative": True, "below": 0.2, "own_below": 0.5}},
    "skip_outliers: short": {"skip_outliers": {"window": 20, "warmup": 10, "late": {"sigmas": 3}}},
    "spike_escalation: short": {
        "spike_escalation": {"window": 20, "hold": 5, "snapshot_every": 7, "steps_back": 7}
    },
    "warmup_cosine: number": {"warmup_cosine": {"warmup": 20, "max_norm": None}},
    "zclip: late": {"zclip": {"warmup": 5, "late": {"z": 1.0}}},
}

ALONE: dict[str, tuple[Any, int]] = {
    name: ([{name: NEEDED.get(name, {})}], 0) for name in POLICIES
} | {name: ([spec], 0) for name, spec in OTHERS.items()}
SPECS = ALONE | {
    f"{preset}[{i}]": (preset, i) for preset in PRESETS for i in range(len(make_policies(preset)))
}
"""Every policy: what `make_policies` takes, and the index of the policy in the result."""

STREAMS = {"lively": list(lively()), "flat": list(flat())}

Decided = list[list[Action]]


@functools.lru_cache
def _made(which: str) -> Managed:
    specs, place = SPECS[which]
    return make_policies(specs)[place]


def made(which: str) -> Managed:
    """Makes a new policy each time."""
    return copy.deepcopy(_made(which))


def asked(policy: Managed, records: Sequence[StepRecord]) -> Decided:
    """Asks as a training does: with a history as long as the policy looks back."""
    back = policy.lookback
    return [list(policy.decide(records[max(0, i + 1 - back) : i + 1])) for i in range(len(records))]


def strict_json(state: Any) -> Any:
    """Passes a state through JSON, as a checkpoint does; NaN and Inf are not JSON."""
    return json.loads(json.dumps(state, allow_nan=False))


@functools.lru_cache
def with_holes(stream: str, seed: int) -> list[StepRecord]:
    """Makes some metrics of each record missing, some NaN, some infinite."""
    rng = np.random.default_rng(seed)
    found = []
    for each in STREAMS[stream]:
        chance = rng.random(len(each.schema.names))
        values = each.values.copy()
        values[chance < 0.2] = math.nan
        values[chance < 0.05] = math.inf
        kept = [i for i in range(len(values)) if chance[i] < 0.9 or rng.random() < 0.5]
        found.append(record(each.step, {each.schema.names[i]: float(values[i]) for i in kept}))
    return found


@functools.lru_cache
def decided(which: str, stream: str) -> Decided:
    """Returns what a policy asks for in a training that is never stopped."""
    return asked(made(which), STREAMS[stream])


def acting(which: str) -> bool:
    return any(actions for stream in STREAMS for actions in decided(which, stream))


@pytest.mark.parametrize("which", ALONE)
def test_every_policy_acts_in_one_of_these_trainings(which: str) -> None:
    """Otherwise the other tests would not test it."""
    assert acting(which)


@pytest.mark.parametrize("which", SPECS)
@pytest.mark.parametrize("stream", STREAMS)
def test_two_copies_decide_alike_on_the_same_records(which: str, stream: str) -> None:
    records = STREAMS[stream]
    one, other = made(which), made(which)
    for i, expected in enumerate(decided(which, stream)):
        history = records[max(0, i + 1 - one.lookback) : i + 1]
        assert list(one.decide(history)) == list(other.decide(tuple(history))) == expected


@pytest.mark.parametrize("which", SPECS)
@pytest.mark.parametrize("stream", STREAMS)
def test_a_policy_resumed_from_its_state_decides_as_if_never_stopped(
    which: str, stream: str
) -> None:
    """A new process takes over at every step."""
    state, records = made(which).state_dict(), STREAMS[stream]
    for i, expected in enumerate(decided(which, stream)):
        policy = made(which)
        if state is not None:
            policy.load_state_dict(strict_json(state))
        assert list(policy.decide(records[max(0, i + 1 - policy.lookback) : i + 1])) == expected
        state = policy.state_dict()


@pytest.mark.parametrize("which", SPECS)
def test_a_state_is_a_copy_that_later_steps_do_not_change(which: str) -> None:
    policy, records = made(which), STREAMS["lively"]
    asked(policy, records[:90])
    state = policy.state_dict()
    before = json.dumps(state)
    after = asked(policy, records[90:])
    assert json.dumps(state) == before
    if state is not None:
        again = made(which)
        again.load_state_dict(state)
        assert asked(again, records[90:]) == after
        assert json.dumps(state) == before


@pytest.mark.parametrize("which", SPECS)
def test_a_policy_starts_fresh_in_a_second_training(which: str) -> None:
    policy = made(which)
    asked(policy, STREAMS["flat"])
    policy.reset()
    assert asked(policy, STREAMS["lively"]) == decided(which, "lively")


@pytest.mark.parametrize("which", SPECS)
def test_a_policy_asks_only_for_its_action_kinds_and_existing_parameters(which: str) -> None:
    policy = made(which)
    for stream, records in STREAMS.items():
        for each, actions in zip(records, decided(which, stream), strict=True):
            for action in actions:
                assert action.kind in policy.action_kinds
                assert action.reason
                assert "\n" not in action.reason
                assert isinstance(action.targets, tuple)
                assert all(fnmatch.filter(TENSORS, target) for target in action.targets)
                if action.kind in ("clip_each", "scale_each"):
                    assert {*action.values} <= {*TENSORS}
                assert all(each[name] == value for name, value in action.read.items())
                numbers = [*action.values.values(), *action.read.values()]
                assert all(type(number) in (int, float) for number in numbers)


@pytest.mark.parametrize("which", SPECS)
def test_the_needed_metrics_of_a_policy_are_all_that_it_needs(which: str) -> None:
    """A replay reads only these metrics and those that actions report."""
    policy = made(which)
    for stream, records in STREAMS.items():
        fewer = [
            record(
                r.step,
                {n: r[n] for p in (*policy.needed_metrics, MAX_STEPS) for n in r.schema.match(p)},
            )
            for r in records
        ]
        policy.reset()
        whole = [[(a.kind, a.values, a.targets) for a in acts] for acts in decided(which, stream)]
        found = [[(a.kind, a.values, a.targets) for a in acts] for acts in asked(policy, fewer)]
        assert found == whole


@pytest.mark.parametrize("which", SPECS)
@pytest.mark.parametrize("stream", STREAMS)
def test_missing_values_cause_no_error_and_do_not_spoil_the_memory(which: str, stream: str) -> None:
    policy = made(which)
    for seed in range(3):
        policy.reset()
        for actions in asked(policy, with_holes(stream, seed)):
            assert all(isinstance(action, Action) for action in actions)
        strict_json(policy.state_dict())


@pytest.mark.parametrize("which", SPECS)
@pytest.mark.parametrize("hole", [None, math.nan])
def test_a_policy_does_nothing_if_its_metrics_are_unknown(which: str, hole: float | None) -> None:
    policy = made(which)
    names = () if hole is None else STREAMS["lively"][0].schema.names
    empty = [record(step, dict.fromkeys(names, math.nan)) for step in range(1, 60)]
    found = {a.kind for actions in asked(policy, empty) for a in actions} - {"snapshot"}
    goes_by_metrics = isinstance(policy.policy, BuiltinPolicy) and policy.policy.needed_metrics
    assert bool(found) == (not goes_by_metrics)


@pytest.mark.parametrize("which", SPECS)
def test_steps_without_metrics_do_not_keep_a_policy_from_acting_later(which: str) -> None:
    policy = made(which)
    unknown, found = [record(step, {}) for step in range(1, 4)], []
    for records in STREAMS.values():
        policy.reset()
        later = [StepRecord(r.step + 3, r.time, r.schema, r.values) for r in records]
        found += asked(policy, [*unknown, *later])[3:]
    assert any(found) == acting(which)


@pytest.mark.parametrize("which", SPECS)
def test_no_policy_needs_more_steps_before_acting_than_it_says(which: str) -> None:
    policy = made(which)
    silent = getattr(policy.policy, "steps_before_acting", 0)
    for stream in STREAMS:
        early = [a for actions in decided(which, stream)[:silent] for a in actions]
        assert {action.kind for action in early} <= {"snapshot"}


@pytest.mark.parametrize("which", SPECS)
def test_what_a_policy_remembers_does_not_grow_with_the_training(which: str) -> None:
    """Settings fill the windows of AutoClip and AdaGC sooner."""
    policy = made(which)
    sizes = []
    for turn in range(4):
        for i, each in enumerate(STREAMS["lively"]):
            step = turn * len(STREAMS["lively"]) + i + 1
            list(policy.decide([StepRecord(step, each.time, each.schema, each.values)]))
        sizes.append(_size(policy.state_dict()))
    window = getattr(policy.policy, "window", 0)
    assert sizes[3] == sizes[2] or window > 4 * len(STREAMS["lively"])


def _size(state: Any) -> int:
    """Counts numbers and texts in a state; a list of at most 10 counts as none."""
    if isinstance(state, dict):
        return sum(_size(value) for value in state.values())
    if isinstance(state, list):
        return len(state) if len(state) > 10 else 0
    return 1


def test_a_set_of_all_policies_decides_as_each_of_them_alone() -> None:
    managed = [made(which) for which in POLICIES]
    every = PolicySet(managed, "shadow")
    for i, each in enumerate(STREAMS["lively"]):
        found: dict[str, list[Action]] = {which: [] for which in POLICIES}
        for decision in every.decide(each):
            assert decision.mode == "shadow"
            found[decision.policy].append(decision.action)
        assert found == {which: decided(which, "lively")[i] for which in POLICIES}


SETTINGS = [
    (name, field.name)
    for name, kind in POLICIES.items()
    for field in dataclasses.fields(kind)
    if field.init and field.name != "name"
]


@pytest.mark.parametrize(("policy", "setting"), SETTINGS)
def test_a_setting_of_the_wrong_type_is_refused_with_the_names_of_policy_and_setting(
    policy: str, setting: str
) -> None:
    given = NEEDED.get(policy, {}) | {setting: {}}
    with pytest.raises(InputError) as error:
        POLICIES[policy](name="mine", **given)
    assert str(error.value).startswith(f"policy mine: {setting} is {{}}; expected ")


def test_builtin_policies_look_at_the_newest_record_and_those_of_users_at_256() -> None:
    assert {made(which).lookback for which in SPECS} == {1}
    (function,) = make_policies([lambda _: ()])
    assert function.lookback == HISTORY == 256
