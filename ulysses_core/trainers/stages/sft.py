"""Stage `sft`: supervised fine-tuning on the answers of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ulysses_core.data import DataConfig, DataStats
from ulysses_core.data.examples import Example, to_example
from ulysses_core.data.tokenize import tokenize_sft
from ulysses_core.trainers.causal_lm import build_causal_lm_trainer
from ulysses_core.trainers.stage import Stage, plain_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STAGE"]


def _tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[dict[str, Any]], DataStats]:
    rows, stats = tokenize_sft(examples, tokenizer, config)
    return [row.as_columns() for row in rows], stats


STAGE = Stage(
    name="sft",
    kind="conversations",
    convert=to_example,
    tokenize=_tokenize,
    make_arguments=plain_arguments,
    build_trainer=build_causal_lm_trainer,
)
