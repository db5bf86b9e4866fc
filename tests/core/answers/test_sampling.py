from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, set_seed

from tests.support.stage_cases import StageCase, build_stage_model, build_words
from ulysses_core.answers import Sampling, answer_prompts, keep_random_state, stop_tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return build_stage_model(StageCase(stage="sft"))


def answer(model: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    sampling = Sampling(**{"max_new_tokens": 6, **settings})
    return answer_prompts(model, build_words(), prompts, sampling, stops=[1]).tolist()


def test_an_answer_does_not_depend_on_the_other_prompts_of_its_batch(model: Any) -> None:
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    together = answer(model, prompts)
    alone = [answer(model, [prompt])[0] for prompt in prompts]
    assert [row[: len(a)] for row, a in zip(together, alone, strict=True)] == alone


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(model: Any) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(answer(model, [[5, 6]], num_answers=4, temperature=1.0))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4


def test_the_models_own_generation_settings_do_not_matter_and_stay(model: Any) -> None:
    before = answer(model, [[5, 6, 7]])
    own = GenerationConfig(repetition_penalty=9.0, do_sample=True, temperature=9.0)
    model.generation_config = own
    assert answer(model, [[5, 6, 7]]) == before
    assert model.generation_config is own
    model.generation_config = GenerationConfig()


def test_a_model_in_training_answers_without_dropout_and_trains_on(model: Any) -> None:
    expected = answer(model, [[5, 6, 7]])
    model.train()
    model.config.attention_dropout = 0.9
    assert answer(model, [[5, 6, 7]]) == expected
    assert model.training
    model.config.attention_dropout = 0.0


def test_an_answer_ends_where_the_models_positions_end(model: Any) -> None:
    prompt = [5] * 60  # of 64 positions
    assert len(answer(model, [prompt], max_new_tokens=50)[0]) <= 4


def test_random_states_are_restored() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(1))  # noqa: NPY002 - the global one

    set_seed(1)
    expected = draw()
    set_seed(1)
    with keep_random_state():
        draw()
    assert draw() == expected


def test_the_stop_of_a_template_counts_if_it_is_one_token(model: Any) -> None:
    tokenizer = build_words()
    assert stop_tokens(tokenizer, "chatml", model) == [1]
    tokenizer.add_tokens(["<|im_end|>"])
    assert stop_tokens(tokenizer, "chatml", model) == [1, len(tokenizer) - 1]


def test_without_a_template_the_model_says_what_ends_an_answer(model: Any) -> None:
    before = model.generation_config
    for own, expected in ((None, [1]), (7, [1, 7]), ([1, 8, 7], [1, 7, 8])):
        model.generation_config = GenerationConfig(eos_token_id=own)
        assert stop_tokens(build_words(), None, model) == expected
        assert stop_tokens(build_words(), "default", model) == [1]
    model.generation_config = before
