"""What is read of a transformers model: its vocabulary and its tied weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ulysses_monitor.session.model_facts import (
    chance_loss,
    count_untied,
    end_tokens,
    special_tokens,
)

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 50,
}


def build(kind: str = "LlamaForCausalLM", **settings: Any) -> Any:
    import transformers

    return getattr(transformers, kind)(transformers.LlamaConfig(**SIZES | settings))


def with_adapters(model: Any, *targets: str) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets)))


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary() -> None:
    assert chance_loss(build()) == pytest.approx(math.log(50))
    assert chance_loss(with_adapters(build(), "q_proj", "lm_head")) == pytest.approx(math.log(50))


def test_what_is_not_a_language_model_has_no_chance() -> None:
    assert math.isnan(chance_loss(nn.Linear(2, 2)))
    assert math.isnan(chance_loss(build("LlamaForSequenceClassification", pad_token_id=0)))


def test_a_tie_that_was_lost_is_counted_if_a_half_is_trained() -> None:
    model = build(tie_word_embeddings=True)
    assert count_untied(model) == 0
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert count_untied(model) == 1
    assert count_untied(with_adapters(model, "q_proj")) == 0  # both halves are frozen
    model.tie_weights()
    assert count_untied(model) == 0


def test_a_model_that_ties_nothing_says_so() -> None:
    assert count_untied(build(tie_word_embeddings=False)) is None
    assert count_untied(nn.Linear(2, 2)) is None


def test_an_adapter_in_the_place_of_a_tied_weight_is_not_a_lost_tie() -> None:
    model = with_adapters(build(tie_word_embeddings=True), "lm_head", "embed_tokens")
    assert torch.is_tensor(model.get_base_model().lm_head.weight)
    assert count_untied(model) == 0


def test_a_model_says_which_tokens_end_a_text() -> None:
    assert end_tokens(build(eos_token_id=7)) == (7,)
    assert end_tokens(with_adapters(build(eos_token_id=[7, 9]), "q_proj")) == (7, 9)
    assert end_tokens(nn.Linear(2, 2)) == ()


def test_a_tokenizer_and_a_processor_say_which_tokens_are_special_with_and_without_a_role() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, "<unk>"))
    roles = {"unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **roles)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    mark = tokenizer.convert_tokens_to_ids("<|user|>")
    assert special_tokens(tokenizer) == (0, 2, mark)
    assert special_tokens(SimpleNamespace(tokenizer=tokenizer)) == (0, 2, mark)
    assert special_tokens(None) is None
    assert special_tokens(nn.Linear(2, 2)) is None
