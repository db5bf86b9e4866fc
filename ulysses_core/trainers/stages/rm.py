"""Stage `rm`: a reward model, trained on preference pairs with TRL's RewardTrainer.

The model is a sequence classifier with one output: the score of a row is read at its last token.
The loss is -log sigmoid(score of the chosen - score of the rejected row) (Bradley-Terry).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ulysses_core.config import RunConfig
from ulysses_core.data import DataConfig, DataStats
from ulysses_core.data.examples import Pair, to_pair
from ulysses_core.data.preferences import tokenize_pairs
from ulysses_core.trainers.stage import Arguments, Parts, Stage, finish_trainer, with_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

__all__ = ["STAGE"]


def _tokenize(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[dict[str, Any]], DataStats]:
    rows, stats = tokenize_pairs(pairs, tokenizer, config)
    sides = ("chosen_ids", "rejected_ids")
    return [{side: row["prompt_ids"] + row[side] for side in sides} for row in rows], stats


def _arguments(_: RunConfig) -> Arguments:
    from trl import RewardConfig

    return with_defaults(RewardConfig, {"max_length": None})  # rows are truncated already


def _build(parts: Parts) -> Trainer:
    from trl import RewardTrainer

    trainer = RewardTrainer(
        model=parts.model,
        args=parts.args,
        train_dataset=parts.data.train,
        eval_dataset=parts.data.eval,
        processing_class=parts.tokenizer,
    )
    return finish_trainer(trainer, parts.data)


STAGE = Stage(
    name="rm",
    kind="pairs",
    task="score",
    convert=to_pair,
    tokenize=_tokenize,
    make_arguments=_arguments,
    build_trainer=_build,
)
