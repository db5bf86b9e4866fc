from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from ulysses_core.answers import pass_at_k, vote


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(right: int, k: int) -> None:
    answers = [i < right for i in range(5)]
    drawn = fmean(any(draw) for draw in combinations(answers, k))
    assert pass_at_k(5, right, k) == pytest.approx(drawn, rel=1e-12)


def test_pass_at_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="k is 3; expected a number from 1 to 2"):
        pass_at_k(2, 1, 3)


def test_a_vote_counts_final_answers_whatever_the_thoughts() -> None:
    answers = ["<think>a</think>7", "<think>b</think>8", "<think>c</think> 8", "7 or 8"]
    assert vote(answers) == 1


def test_of_equally_common_answers_the_first_wins() -> None:
    assert vote(["9", "8", "8", "9"]) == 0


def test_answers_without_an_end_have_no_vote() -> None:
    assert vote(["<think>endless", "<think>endless", "8"]) == 2
    assert vote(["", "<think>endless"]) is None
