"""The trainer of stages `pt` and `sft`: transformers' own, on rows with labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ulysses_core.data import CausalCollator
from ulysses_core.trainers.dft import dft_trainer_class
from ulysses_core.trainers.stage import Parts, finish_trainer

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["build_causal_lm_trainer"]


def build_causal_lm_trainer(parts: Parts) -> Trainer:
    """Builds a Trainer on the rows' labels; it also evaluates held-out rows if there are any."""
    from transformers import Trainer

    pad = parts.tokenizer.pad_token_id
    label_pad = {} if parts.config.data.ignore_pad_token_for_loss else {"label_pad_id": pad}
    kind = dft_trainer_class() if parts.config.finetuning.use_dft_loss else Trainer
    trainer = kind(
        model=parts.model,
        args=parts.args,
        train_dataset=parts.data.train,
        eval_dataset=parts.data.eval,
        data_collator=CausalCollator(pad, **label_pad),
        processing_class=parts.tokenizer,
    )
    return finish_trainer(trainer, parts.data)
