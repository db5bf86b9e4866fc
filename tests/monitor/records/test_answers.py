from __future__ import annotations

from typing import Any

import pytest

from ulysses_monitor.records.answers import SampledAnswer, read_answers


def test_answers_are_paired_with_prompts_and_references() -> None:
    data = {"prompts": ["a", "b"], "answers": ["1", "2"], "references": ["1", "3"]}
    assert read_answers(data) == [SampledAnswer("a", "1", "1"), SampledAnswer("b", "2", "3")]
    del data["references"]
    assert [answer.reference for answer in read_answers(data)] == [None, None]


@pytest.mark.parametrize(
    "data",
    [{}, {"prompts": "a", "answers": ["1"]}, {"prompts": ["a"], "answers": None}],
)
def test_data_of_another_form_has_no_answers(data: dict[str, Any]) -> None:
    assert read_answers(data) == []
