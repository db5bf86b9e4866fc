"""Stage `kto`: answers tagged desirable or not, with TRL's KTOTrainer (arXiv 2402.01306)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ulysses_core.config import RunConfig
from ulysses_core.data.examples import to_tagged
from ulysses_core.data.preferences import find_one_sided, tokenize_tagged
from ulysses_core.trainers.reference import ReferenceKeys, needs_reference
from ulysses_core.trainers.stage import (
    Arguments,
    Parts,
    Stage,
    finish_trainer,
    with_defaults,
)
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["STAGE", "KtoKeys"]

_ACROSS_BATCHES = 1000
"""Rows among which answers are paired if a batch has one row, as in LLaMA-Factory."""


class KtoKeys(ReferenceKeys):
    """The keys of stage `kto`."""

    pref_beta: float = Field(default=0.1, gt=0)
    """How strongly the reference model holds the policy back."""
    kto_chosen_weight: float = Field(default=1.0, gt=0)
    """Weight of desirable answers in the loss."""
    kto_rejected_weight: float = Field(default=1.0, gt=0)
    """Weight of undesirable answers in the loss."""


def _arguments(config: RunConfig) -> Arguments:
    from trl import KTOConfig

    keys = config.stage_keys
    assert isinstance(keys, KtoKeys)  # noqa: S101 - the config was read with them
    strategy = config.training.get("train_sampling_strategy", "sequential")
    if strategy != "sequential":
        raise InputError(
            f"train_sampling_strategy is {strategy}; expected sequential, because stage kto pairs "
            "the rows of a batch beforehand; they are shuffled once"
        )
    return with_defaults(
        KTOConfig,
        {
            "train_sampling_strategy": strategy,
            "beta": keys.pref_beta,
            "desirable_weight": keys.kto_chosen_weight,
            "undesirable_weight": keys.kto_rejected_weight,
            "max_length": None,  # rows are truncated already
        },
    )


def _build(parts: Parts) -> Trainer:
    trainer = _trainer_class()(
        model=parts.model,
        ref_model=parts.make_reference() if needs_reference(parts) else None,
        args=parts.args,
        train_dataset=parts.data.train,
        eval_dataset=parts.data.eval,
        processing_class=parts.tokenizer,
    )
    return finish_trainer(trainer, parts.data)


@cache
def _trainer_class() -> Any:
    from trl import KTOTrainer

    class TokenisedKTOTrainer(KTOTrainer):
        """A KTOTrainer whose rows are tokenised already, and that takes batches of one row too."""

        def __init__(self, args: Any, **settings: Any) -> None:
            # TRL refuses batches of one row, in which it would pair a row with itself.
            size = args.per_device_train_batch_size
            self._pairing_size = size if size > 1 else _ACROSS_BATCHES
            args.per_device_train_batch_size = max(size, 2)
            super().__init__(args=args, **settings)
            args.per_device_train_batch_size = size
            self._train_batch_size = args.train_batch_size

        def _prepare_dataset(self, dataset: Any, _: Any, args: Any, name: str) -> Any:
            """Adds the answer of the row before, with which TRL estimates the divergence."""
            from datasets import Dataset

            in_memory = {"keep_in_memory": True} if isinstance(dataset, Dataset) else {}
            if name == "train" and in_memory:  # a stream is shuffled already
                dataset = dataset.shuffle(seed=args.data_seed or args.seed, **in_memory)
            if not self.calculate_KL:
                return dataset

            def rotate(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
                answers = rows["completion_ids"]
                return rows | {"KL_completion_ids": [answers[-1], *answers[:-1]]}

            size = self._pairing_size
            return dataset.map(rotate, batched=True, batch_size=size, **in_memory)

    return TokenisedKTOTrainer


STAGE = Stage(
    name="kto",
    kind="tagged",
    keys=KtoKeys,
    convert=to_tagged,
    tokenize=tokenize_tagged,
    find_problem=find_one_sided,
    make_arguments=_arguments,
    build_trainer=_build,
)
