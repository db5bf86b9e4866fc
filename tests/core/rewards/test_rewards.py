"""What the rewards count as a right answer, how they are named, and what happens if one fails."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest

from ulysses_core.rewards import ExactAnswer, Format, LanguageConsistency, make_rewards
from ulysses_monitor.common.errors import InputError


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("42", "42", 1.0),
        ("<think>6 * 7</think> 42.", "42", 1.0),
        ("<think>42</think> 41", "42", 0.0),
        ("<think>it is 42", "42", 0.0),
        ("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1.0),
        ("<answer>1,000</answer> done", "1000.0", 1.0),
        ("carry 1, so #### 17", "9 + 8: #### 17", 1.0),
        ("Paris ", " paris.", 1.0),
        ("", "42", 0.0),
        ("nan", "nan", 1.0),
        ("42", None, None),
        ("42", "", None),
    ],
)
def test_an_answer_is_exact(completion: str, answer: str | None, expected: float | None) -> None:
    assert ExactAnswer().score([completion], [answer]) == [expected]


@pytest.mark.parametrize(
    ("completion", "opened", "expected"),
    [
        ("<think>carry 1</think>17", False, 1.0),
        ("  <think>a\nb</think>\n17\n", False, 1.0),
        ("carry 1</think>17", True, 1.0),
        ("carry 1</think>17", False, 0.0),
        ("<think></think>17", False, 0.0),
        ("<think>carry 1</think> ", False, 0.0),
        ("<think>a</think><think>b</think>17", False, 0.0),
        ("so <think>a</think>17", False, 0.0),
        ("17", False, 0.0),
    ],
)
def test_a_format_is_a_thought_and_an_answer(
    completion: str, opened: bool, expected: float
) -> None:
    assert Format(opened=opened).score([completion]) == [expected]


def test_a_language_is_consistent_with_the_prompts_or_the_given_script() -> None:
    reward = LanguageConsistency()
    assert reward.score(["What is it?"] * 3, ["a cat", "ab\u4e2d\u6587", "42"]) == [1.0, 0.5, 1.0]
    assert LanguageConsistency(script="cjk").score(["What?"], ["ab\u4e2d\u6587\u6587\u6587"]) == [
        4 / 6
    ]


COLUMNS: dict[str, Any] = {
    "prompts": ["1 + 1", "2 + 2"],
    "completions": ["2", "5"],
    "answers": ["2", "4"],
    "where": ["a.json, row 1", "a.json, row 2"],
}


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("rewards_for_tests")
    monkeypatch.setitem(sys.modules, "rewards_for_tests", module)
    return module


def test_rewards_have_names_weights_and_settings(mine: Any) -> None:
    mine.length = lambda completions: [len(text) for text in completions]
    scorers = make_rewards(
        ["exact_answer", {"format": {"weight": 0.2, "opened": True}}, "rewards_for_tests:length"]
    )
    assert [(each.name, each.weight) for each in scorers] == [
        ("exact_answer", 1.0),
        ("format", 0.2),
        ("length", 1.0),
    ]
    assert [each.score(**COLUMNS) for each in scorers] == [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


def test_a_users_class_takes_settings_and_a_function_may_take_every_column(mine: Any) -> None:
    class Scaled:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def score(self, **columns: Any) -> list[float]:
            return [self.factor * len(text) for text in columns["where"]]

    mine.Scaled = Scaled
    [scorer] = make_rewards([{"rewards_for_tests:Scaled": {"factor": 2}}])
    assert scorer.score(**COLUMNS) == [26.0, 26.0]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "reward_funcs is empty; expected one or more of exact_answer, format"),
        (["exact"], "reward_funcs: 'exact' is not a reward"),
        ([{"format": {"open": 1}}], "reward format: unknown setting 'open'"),
        ([{"format": {"weight": "much"}}], "reward format: weight is 'much'; expected a number"),
        (["rewards_for_tests:none"], "rewards_for_tests has no none"),
        ("exact_answer", "reward_funcs: got str; expected a list"),
    ],
)
def test_a_wrong_reward_is_refused(mine: Any, specs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_rewards(specs)


def _raise_for_the_second(completions: list[str]) -> list[float]:
    if "5" in completions:
        raise KeyError("five")
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_raise_for_the_second, "a.json, row 2, prompt '2 + 2': KeyError: 'five'"),
        (lambda **_: [1.0, math.nan], "row 2, prompt '2 \\+ 2': returned nan; expected a"),
        (lambda **_: [1.0, "good"], "row 2, prompt '2 \\+ 2': returned 'good'; expected"),
        (
            lambda **_: [1.0],
            "row 1, prompt '1 \\+ 1': returned 1 rewards for 2 completions",
        ),
    ],
)
def test_a_reward_that_fails_names_itself_and_the_prompt(function: Any, message: str) -> None:
    [scorer] = make_rewards([function])
    with pytest.raises(InputError, match=message.replace("2 + 2", "2 \\+ 2")) as caught:
        scorer.score(**COLUMNS)
    assert str(caught.value).startswith(f"reward {scorer.name}: ")
    assert "\n" not in str(caught.value)
