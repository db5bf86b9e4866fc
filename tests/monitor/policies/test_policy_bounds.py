"""How often and how long a policy acts, drawn as one character a step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.monitor.policies.policy_records import MEAN, acting_steps, series
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.policies.small_gradients import LearningRateBoost


def acts(policy: BoundedPolicy, condition: str, key: str = "spell") -> str:
    """Draws each step at which the policy acts as ``#``.

    Of the condition, ``#`` begins a spell, ``-`` only keeps it going, and ``.`` ends it.
    """
    return "".join(".#"[policy.should_act(c == "#", c in "#-", key)] for c in condition)


@pytest.mark.parametrize(
    ("settings", "condition", "expected"),
    [
        ({}, "#.##.", "#.##."),
        ({"patience": 3}, "##.####.###", ".....##...#"),
        ({"patience": 3}, "##-##-###", "........#"),
        ({}, "--#--.--#", "..###...#"),
        ({"patience": 2}, "##--.##", ".###..#"),
    ],
)
def test_a_spell_starts_after_patience_and_lasts_while_the_weaker_condition_holds(
    settings: dict[str, int], condition: str, expected: str
) -> None:
    assert acts(BoundedPolicy(**settings), condition) == expected


@pytest.mark.parametrize(
    ("settings", "condition", "expected"),
    [
        ({"longest": 3, "cooldown": 2}, "##########", "###..###.."),
        ({"longest": 3, "cooldown": 1}, "########", "###.###."),
        ({"longest": 3, "cooldown": 2}, "#---------", "###......."),
        ({"longest": 3, "cooldown": 5}, "###.###.#", "###.###.#"),
        ({"longest": 2, "cooldown": 0}, "#######", "#######"),
        ({"longest": 2, "cooldown": 0, "patience": 2}, "#######", ".##.##."),
        ({"longest": 1, "cooldown": 2, "patience": 2}, "########", ".#...#.."),
        ({"longest": 2, "cooldown": 3}, "##...##", "##...##"),
        ({"longest": 2, "cooldown": 3}, "###...#", "##....#"),
    ],
)
def test_only_a_longest_spell_is_followed_by_a_rest(
    settings: dict[str, int], condition: str, expected: str
) -> None:
    assert acts(BoundedPolicy(**settings), condition) == expected


def test_all_spells_together_have_at_most_most_steps() -> None:
    assert acts(BoundedPolicy(most=4), "##.####.#") == "##.##...."
    assert acts(BoundedPolicy(most=5, longest=2, cooldown=1), "#########") == "##.##.#.."


def test_spells_of_different_keys_are_counted_separately() -> None:
    policy = BoundedPolicy(most=2)
    assert acts(policy, "###", "one") == "##."
    assert acts(policy, "###", "other") == "##."


def test_a_spell_continues_from_a_saved_state() -> None:
    condition = "##-##############-###.######"
    whole = acts(BoundedPolicy(patience=2, longest=4, cooldown=3, most=11), condition)
    for k in range(len(condition)):
        before, after = (
            BoundedPolicy(patience=2, longest=4, cooldown=3, most=11) for _ in range(2)
        )
        start = acts(before, condition[:k])
        after.load_state_dict(before.state_dict())
        assert start + acts(after, condition[k:]) == whole


def test_by_default_a_policy_acts_200_steps_rests_20_and_acts_again() -> None:
    found = acting_steps(LearningRateBoost(), series(MEAN, [1e-4] * 250))
    assert found == [*range(1, 201), *range(221, 251)]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("patience", 0, "an integer of 1 or more"),
        ("patience", True, "an integer of 1 or more"),
        ("longest", 0, "an integer of 1 or more"),
        ("most", 0, "an integer of 1 or more"),
        ("most", 2.0, "an integer of 1 or more"),
        ("cooldown", -1, "an integer of 0 or more"),
        ("cooldown", "20", "an integer of 0 or more"),
        ("patience", None, "an integer of 1 or more"),
    ],
)
def test_a_wrong_bound_is_refused(setting: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError) as error:
        BoundedPolicy(**{setting: value})
    message = str(error.value)
    assert message.startswith(f"policy BoundedPolicy: {setting} is {value!r}; expected {expected}")
    assert "\n" not in message
