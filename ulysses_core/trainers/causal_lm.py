"""Stages `pt` and `sft`, with Hugging Face's Trainer on tokenised rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback

from ulysses_core.config import RunConfig
from ulysses_core.data import CausalCollator, DatasetPair

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

__all__ = ["build_causal_lm_trainer"]


def build_causal_lm_trainer(
    config: RunConfig,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetPair,
) -> Trainer:
    """Builds a Trainer on the rows' labels; it also evaluates held-out rows if there are any."""
    pad = tokenizer.pad_token_id
    label_pad = {} if config.data.ignore_pad_token_for_loss else {"label_pad_id": pad}
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=CausalCollator(pad, **label_pad),
        processing_class=tokenizer,
        callbacks=[_FinalEvaluation()] if data.eval is not None else None,
    )
    trainer.remove_callback(PrinterCallback)  # the console sink prints the same numbers
    return trainer


class _FinalEvaluation(TrainerCallback):
    """Evaluates after the last step, whatever `eval_strategy` is."""

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - transformers fixes the signature
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
