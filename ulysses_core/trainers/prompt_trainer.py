"""The trainer of prompts that are tokenised: samples answers, scores them, knows the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head

from ulysses_core.answers import gather_to_generate, stop_tokens
from ulysses_core.rewards import Scorer
from ulysses_core.trainers.reference import needs_reference
from ulysses_core.trainers.rollouts import record_log_probs, score_together
from ulysses_core.trainers.stage import Parts
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method

__all__ = ["PromptTrainer"]


class PromptTrainer(GRPOTrainer):
    """A GRPOTrainer of rows of `prompt` (token ids), `question`, `answer` and `where`.

    The reference model is the one that training starts from. With adapters TRL finds it in the
    model; otherwise it would load it by the model's name, so `make_reference` makes it here.

    Args:
        scorers: what scores the answers.
        parts: see `Parts`.
        beta: weight of the divergence from the reference; 0 for none.
        others: names of rewards that the subclass puts into `_scores` itself.
    """

    def __init__(
        self, scorers: Sequence[Scorer], parts: Parts, beta: float, others: Sequence[str] = ()
    ) -> None:
        self._scorers = scorers
        self._scores: dict[str, list[float | None]] = {}
        has_own = beta > 0 and needs_reference(parts)
        parts.args.beta = 0.0 if has_own else beta
        super().__init__(
            model=parts.model,
            reward_funcs=[
                self._name_scores(name) for name in [*(each.name for each in scorers), *others]
            ],
            args=parts.args,
            train_dataset=parts.data.train,
            eval_dataset=parts.data.eval,
            processing_class=parts.tokenizer,
        )
        self.eos_token_ids = stop_tokens(
            parts.tokenizer, parts.config.data.template, self.base_model
        )
        self.generation_config.eos_token_id = self.eos_token_ids
        if has_own:
            reference = parts.make_reference()
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.prepare_frozen(reference)
        self.beta = self.args.beta = beta

    def prepare_frozen(self, model: PreTrainedModel) -> Any:
        """Returns a model that is not trained, as the engine runs it."""
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def get_train_dataloader(self) -> Any:
        """Returns the prompts to train on.

        Raises:
            InputError: they are fewer than are answered at a time; TRL would train no step.
        """
        needed, found = self.args.generation_batch_size // self.num_generations, self.train_dataset
        if len(found) < needed:
            raise InputError(
                f"the dataset has {len(found)} prompts; expected at least {needed}, which are "
                "answered at a time; lower per_device_train_batch_size or "
                "gradient_accumulation_steps, or use more rows"
            )
        return super().get_train_dataloader()

    @property
    def mode(self) -> str:
        """`train` or `eval`, the key of the metrics."""
        return "train" if self.model.training else "eval"

    @property
    def base_model(self) -> Any:
        """The model without engine and adapters around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Leaves TRL's copy of the starting adapters out: ZeRO-3 gives no weights that are frozen.

        A resumed training makes it anew.
        """
        undo: Undo | None = None
        if "ref" in getattr(self.model, "peft_config", {}):
            undo = patch_method(self.model, "save_pretrained", _save_trained)
        try:
            super()._save(*args, **kwargs)
        finally:
            if undo is not None:
                undo()

    def _name_scores(self, name: str) -> Callable[..., list[float | None]]:
        def read_scores(**_: Any) -> list[float | None]:
            return self._scores[name]

        read_scores.__name__ = name
        return read_scores

    def _tokenize_prompts(self, prompts: list[list[int]]) -> Any:
        return prompts, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        gather_to_generate(self.accelerator.unwrap_model(self.model))
        with record_log_probs(self.base_model, self.temperature) as recorder:
            answers, _ = super()._generate_single_turn(*args, **kwargs)
        return answers, recorder.read([len(answer) for answer in answers])

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any
    ) -> Any:
        scores = score_together(
            self._scorers,
            prompts=[row["question"] for row in inputs],
            completions=completions,
            answers=[row["answer"] for row in inputs],
            where=[row["where"] for row in inputs],
            completion_ids=completion_ids,
        )
        names = [scorer.name for scorer in self._scorers]
        self._scores |= dict(zip(names, scores, strict=True))
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids)


def _save_trained(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, selected_adapters=["default"], **kwargs)
