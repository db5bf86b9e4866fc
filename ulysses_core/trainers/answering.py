"""A training's answers: compared with references in evaluations, and recorded every N steps.

The model takes the most probable token each time, so nothing here draws a random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ulysses_core.config import RunConfig
from ulysses_core.data.examples import Example, Message
from ulysses_core.data.prompts import Prompt, tokenize_prompts
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, Trainer

    from ulysses_monitor.monitor import Monitor

__all__ = ["check_answers", "compare_in_evaluations", "record_answers"]

_DEFAULT_PROMPTS = 3


def check_answers(config: RunConfig) -> None:
    """Checks the settings about answers, without importing transformers.

    Raises:
        InputError: they do not fit the stage, the data or the monitor.
    """
    answers, stage = config.answers, config.finetuning.stage
    if answers.predict_with_generate:
        _check_comparison(config)
    if answers.sample_prompts and answers.sample_answers_every is None:
        raise InputError("sample_prompts is set; set sample_answers_every too")
    if answers.sample_answers_every is None:
        return
    if not config.settings.monitor.enabled:
        raise InputError(
            "sample_answers_every is set, but monitor is false, so nothing would record the "
            "answers; remove one of them"
        )
    if stage == "rm":
        raise InputError(
            "sample_answers_every is set; a reward model answers nothing, so remove it"
        )
    if not answers.sample_prompts and stage != "sft":
        raise InputError(
            f"sample_answers_every is set, but sample_prompts is not; stage {stage} needs a list "
            "of prompts"
        )


def _check_comparison(config: RunConfig) -> None:
    from ulysses_monitor.common.extras import find_missing

    data, stage = config.data, config.finetuning.stage
    if stage != "sft":
        raise InputError(f"predict_with_generate is true; expected stage sft, not {stage}")
    if not data.eval_dataset and not data.val_size:
        raise InputError("predict_with_generate is true; set eval_dataset or val_size too")
    for key in ("packing", "neat_packing", "train_on_prompt"):
        if getattr(data, key):
            raise InputError(
                f"predict_with_generate and {key} are both true; keep one of them, because "
                f"{key} mixes prompts and answers"
            )
    if missing := find_missing("text-metrics"):
        raise InputError(
            f"predict_with_generate needs {missing[0]}, which is not installed; run "
            "pip install 'ulysses-toolkit[text-metrics]'"
        )


# -- evaluations -----------------------------------------------------------------------------------


def compare_in_evaluations(trainer: Trainer, config: RunConfig) -> Undo:
    """Adds BLEU, ROUGE-L and exact match of generated answers to the metrics of evaluations.

    Every rank answers a part of the held-out prompts, under any engine and sequence parallelism.
    """
    writer = _Writer(trainer, config)

    def evaluate(original: Callable[..., Any], dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = _compare(writer, dataloader.dataset)
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    return patch_method(trainer, "evaluation_loop", evaluate)


def _compare(writer: _Writer, rows: Dataset) -> dict[str, float]:
    from ulysses_core.answers import compare_texts

    pairs = [split_answer(row) for row in rows]
    answers = writer.answer_shared([prompt for prompt, _ in pairs])
    return compare_texts(answers, writer.decode([reference for _, reference in pairs]))


def split_answer(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Returns the prompt and the last answer of a row of tokens.

    Args:
        row: `input_ids`, and `labels` that mark the tokens of answers.
    """
    labels = row["labels"]
    end = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return row["input_ids"][:start], row["input_ids"][start:end]


class _Writer:
    """Answers prompts with the model of a Trainer."""

    def __init__(self, trainer: Trainer, config: RunConfig) -> None:
        from ulysses_core.answers import Sampling, stop_tokens

        self._trainer = trainer
        self._tokenizer: PreTrainedTokenizerBase = trainer.processing_class
        self._stops = stop_tokens(self._tokenizer, config.data.template, self._model)
        self._sampling = Sampling(max_new_tokens=config.answers.max_new_tokens)

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Answers prompts on this rank; every rank calls it with as many batches."""
        return self.decode([row for batch in self._batches(prompts) for row in batch.tolist()])

    def answer_shared(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Answers prompts, each on one rank; every rank gets all answers."""
        import torch

        accelerator = self._trainer.accelerator
        ranks, rank = accelerator.num_processes, accelerator.process_index
        each = -(-len(prompts) // ranks)
        # As many on every rank, because ranks that share weights generate together.
        own = [prompts[min(rank + ranks * i, len(prompts) - 1)] for i in range(each)]
        rows = torch.full((each, self._sampling.max_new_tokens), self._pad, dtype=torch.long)
        place = 0
        for batch in self._batches(own):
            rows[place : place + len(batch), : batch.shape[1]] = batch
            place += len(batch)
        # [W * each, T] -> [each, W, T] -> [each * W, T]: prompt i is on rank i % W
        whole = accelerator.gather(rows.to(accelerator.device)).unflatten(0, (ranks, each))
        return self.decode(whole.transpose(0, 1).flatten(0, 1)[: len(prompts)].tolist())

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @property
    def _model(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    @property
    def _pad(self) -> int:
        return int(self._tokenizer.pad_token_id)

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        from ulysses_core.answers import answer_prompts

        size = self._trainer.args.per_device_eval_batch_size
        return [
            answer_prompts(
                self._model,
                self._tokenizer,
                prompts[start : start + size],
                self._sampling,
                stops=self._stops,
            )
            for start in range(0, len(prompts), size)
        ]


# -- answers as events -----------------------------------------------------------------------------


def record_answers(trainer: Trainer, monitor: Monitor, config: RunConfig) -> None:
    """Makes a Trainer answer a few fixed prompts every N steps, and before and after training.

    The answers are events of kind ``answers``. The random states are kept, and nothing else of the
    training is touched.
    """
    from transformers import TrainerCallback

    from ulysses_core.answers import keep_random_state

    every = config.answers.sample_answers_every
    assert every is not None  # noqa: S101 - the caller's condition
    writer = _Writer(trainer, config)
    prompts, texts, references = _choose_prompts(trainer, writer, config)

    def record() -> None:
        with keep_random_state():
            answers = writer.answer(prompts)
        about = {"prompts": texts, "answers": answers} | references
        if monitor.session is not None:
            monitor.session.event("answers", about)

    class RecordAnswers(TrainerCallback):
        """Answers the prompts at the start, every N steps, and at the end."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - transformers fixes the signature
            record()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            is_last = state.global_step >= state.max_steps or control.should_training_stop
            if state.global_step % every == 0 or is_last:
                record()

    trainer.add_callback(RecordAnswers())  # after the monitor's own, which counts the step


def _choose_prompts(
    trainer: Trainer, writer: _Writer, config: RunConfig
) -> tuple[list[list[int]], list[str], dict[str, list[str]]]:
    """Returns the prompts as tokens and as texts, and reference answers if there are any."""
    given = config.answers.sample_prompts
    if given:
        prompts = [
            Prompt(Example("", (Message("user", text), Message("assistant", "")))) for text in given
        ]
        rows, _ = tokenize_prompts(prompts, trainer.processing_class, config.data)
        return [row["prompt"] for row in rows], given, {}
    rows = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    first = [rows[i] for i in range(min(_DEFAULT_PROMPTS, len(rows)))]
    pairs = [split_answer(row) for row in first]
    ids = [prompt for prompt, _ in pairs]
    return ids, writer.decode(ids), {"references": writer.decode([answer for _, answer in pairs])}
