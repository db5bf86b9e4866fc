"""Which adapter pairs are raised, and for how long."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.monitor.policies.policy_records import OWN_NORM, RATIO, asked, near, record
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.lora import LoraBalance
from ulysses_monitor.records import Action, StepRecord


def name(module: str, side: str) -> str:
    return f"{module}.lora_{side}.default.weight"


def pairs(step: int, **norms: tuple[float, float]) -> StepRecord:
    """Makes a record from the norms of A and B of each module."""
    found = {"grad/norm/param/lm_head.weight": 1.0}
    for module, (a, b) in norms.items():
        found |= {
            f"{OWN_NORM}{name(module, 'A')}": a,
            f"{OWN_NORM}{name(module, 'B')}": b,
            f"{RATIO}module/{module}": b / a if a else math.inf,
        }
    return record(step, found)


def raised(policy: LoraBalance, records: list[StepRecord]) -> list[list[str]]:
    """Returns the modules raised at each step; A and B of each are targets."""
    found = []
    for actions in asked(policy, records):
        targets = [target for action in actions for target in action.targets]
        modules = [target.partition(".")[0] for target in targets[::2]]
        assert targets == [name(module, side) for module in modules for side in "AB"]
        found.append(modules)
    return found


def by_ratio(policy: LoraBalance, *ratios: float) -> list[bool]:
    """Tells for each step of one pair whether the pair is raised."""
    records = [pairs(i, q=(1.0, ratio)) for i, ratio in enumerate(ratios, 1)]
    return [bool(modules) for modules in raised(policy, records)]


def test_the_action_names_the_pairs_and_what_was_read() -> None:
    (actions,) = asked(LoraBalance(), [pairs(1, q=(1.0, 20.0), k=(1.0, 2.0), v=(1.0, 0.05))])
    (action,) = actions
    assert action == Action(
        kind="balance_lora",
        values={"share": 0.5},
        targets=(name("q", "A"), name("q", "B"), name("v", "A"), name("v", "B")),
        reason="2 of 3 adapter pairs are out of balance",
        read={f"{RATIO}module/q": 20.0, f"{RATIO}module/v": 0.05},
    )


def test_a_pair_is_raised_until_it_is_well_within_the_bounds() -> None:
    assert by_ratio(LoraBalance(), 10.0, 10.1, 8.1, 8.0, 8.1, 10.1) == [
        *(False, True, True),
        *(False, False, True),
    ]
    assert by_ratio(LoraBalance(), 0.1, 0.099, 0.1249, 0.125, 0.1) == [
        *(False, True, True, False, False)
    ]


def test_a_pair_near_the_bounds_is_not_raised_when_another_is_beyond_them() -> None:
    records = [
        pairs(1, q=(1.0, 9.0), k=(1.0, 20.0)),
        pairs(2, q=(1.0, 20.0), k=(1.0, 9.0)),
        pairs(3, q=(1.0, 9.0), k=(1.0, 7.0)),
        pairs(4, q=(1.0, 7.0), k=(1.0, 9.0)),
        pairs(5, q=(1.0, 9.0), k=(1.0, 9.0)),
    ]
    assert raised(LoraBalance(), records) == [["k"], ["q", "k"], ["q"], [], []]


@pytest.mark.parametrize(
    "norms",
    [
        *[(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e-8, 1.0), (1.0, 1e-8)],
        *[(math.inf, 1.0), (1.0, math.inf), (math.inf, math.inf)],
        *[(math.nan, 1.0), (1.0, math.nan)],
    ],
)
def test_a_pair_with_an_unusable_norm_is_left_alone(norms: tuple[float, float]) -> None:
    records = [pairs(1, q=norms), pairs(2, q=norms, k=(1.0, 20.0))]
    assert raised(LoraBalance(), records) == [[], ["k"]]


def test_a_floor_can_be_lower() -> None:
    assert raised(LoraBalance(floor=1e-12), [pairs(1, q=(1e-9, 1.0))]) == [["q"]]


def test_the_warm_up_waits_for_a_healthy_adapters_first_steps() -> None:
    """Infinity, 117, 27 after 5 steps, 8 after 20, 2.4 after 100."""
    policy = LoraBalance(warmup=100)
    assert policy.steps_before_acting == 100
    falling = [pairs(1, q=(0.0, 1.0))] + [pairs(i, q=(1.0, 600 / i)) for i in range(2, 301)]
    assert raised(policy, falling) == [[]] * 300
    late = [pairs(i, q=(1.0, 20.0)) for i in range(99, 103)]
    assert raised(LoraBalance(warmup=100), late) == [[], [], ["q"], ["q"]]


def test_lora_balance_has_patience_and_a_longest_spell() -> None:
    policy = LoraBalance(patience=2, longest=3, cooldown=2)
    assert policy.steps_before_acting == 1
    assert by_ratio(policy, *[20.0] * 9) == [
        *(False, True, True, True),
        *(False, False, False, True, True),
    ]


def test_a_record_without_adapters_asks_for_nothing() -> None:
    assert asked(LoraBalance(), [pairs(1), record(2, {})]) == [[], []]


def test_the_share_can_be_set() -> None:
    ((action,),) = asked(LoraBalance(share=0.25), [pairs(1, q=(1.0, 20.0))])
    assert action.values == near({"share": 0.25})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0}, "low is 0; expected a number above 0 and at most 1"),
        ({"low": 1.5}, "low is 1.5"),
        ({"high": 0.5}, "high is 0.5; expected a number from 1"),
        ({"share": 1.1}, "share is 1.1"),
        ({"floor": -1e-9}, "floor is -1e-09"),
        ({"warmup": -1}, "warmup is -1; expected an integer from 0 to 1,000,000"),
        ({"warmup": "100"}, "warmup is '100'"),
        ({"recovered": 0.9}, "recovered is 0.9; expected a number from 1"),
        (
            {"low": 0.9, "high": 1.1},
            "no ratio is above 0.9 and below 1.1 by that factor, so balancing would never end",
        ),
        ({"recovered": 11}, "would never end"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        LoraBalance(**settings)
    assert "\n" not in str(error.value)
