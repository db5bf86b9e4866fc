"""Answers of a model: sampled, scored, compared with references."""

from __future__ import annotations

from ulysses_core.answers.sampling import (
    Sampling,
    answer_prompts,
    gather_to_generate,
    keep_random_state,
    stop_tokens,
)
from ulysses_core.answers.statistics import pass_at_k, vote
from ulysses_core.answers.text_metrics import compare_texts

__all__ = [
    "Sampling",
    "answer_prompts",
    "compare_texts",
    "gather_to_generate",
    "keep_random_state",
    "pass_at_k",
    "stop_tokens",
    "vote",
]
