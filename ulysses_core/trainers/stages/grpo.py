"""Stage `grpo`: sampled answers compared within a prompt, with TRL's GRPOTrainer.

Group relative policy optimisation (arXiv 2402.03300): the advantage of an answer is its reward
minus the mean reward of the prompt's answers, over their spread. The keys have TRL's names and
defaults.

Legend: B rows (answers), T tokens of an answer.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ulysses_core.config import RunConfig
from ulysses_core.data.prompts import to_prompt, tokenize_prompts
from ulysses_core.rewards import check_rewards, make_rewards
from ulysses_core.trainers.reference import ReferenceKeys
from ulysses_core.trainers.rollouts import measure_ratios
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

__all__ = ["STAGE", "GrpoKeys"]


class GrpoKeys(ReferenceKeys):
    """The keys of stage `grpo`."""

    reward_funcs: list[Any] = Field(default_factory=list)
    """Rewards: names, import paths, or mappings of one to settings; see `make_rewards`."""
    num_generations: int = Field(default=8, ge=2)
    """Answers to a prompt."""
    num_generations_eval: int | None = Field(default=None, gt=0)
    """Answers to a prompt in evaluations. Default: `num_generations`."""
    max_completion_length: int = Field(default=256, gt=0)
    """Largest number of tokens of an answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; log-probabilities are computed at the same temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that have this probability together."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most likely tokens; 0 for all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Sample from tokens that have this share of the most likely one's probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Makes tokens less likely that a row has already."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the model that training starts from; 0 loads no reference."""
    epsilon: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may fall, and rise, before it is clipped."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """How far it may rise. Default: `epsilon`."""
    delta: float | None = Field(default=None, gt=0)
    """Upper bound of the ratio where the advantage is negative."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = (
        "dapo"
    )
    """How the tokens' losses are weighted; see TRL."""
    num_iterations: int = Field(default=1, gt=0)
    """Times that answers are trained on."""
    steps_per_generation: int | None = Field(default=None, gt=0)
    """Micro-batches that are sampled at a time. Default: `gradient_accumulation_steps`."""
    scale_rewards: bool | Literal["group", "batch", "none"] = "group"
    """Whether advantages are divided by the spread of a prompt's rewards, of a batch's, or not."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether probability ratios are of tokens or of answers (GSPO)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """Whether rewards are summed before or after advantages are computed."""
    mask_truncated_completions: bool = False
    """Leave answers that reach `max_completion_length` out of the loss."""
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """Train on this share of tokens, those with the highest entropy."""
    entropy_coef: float = 0.0
    """Weight of the entropy in the loss."""
    off_policy_mask_threshold: float | None = Field(default=None, gt=0)
    """Leave out answers with a negative advantage that diverge further than this."""
    use_bias_correction_kl: bool = False
    """Weight the divergence by the probability ratio."""
    disable_dropout: bool = False
    """Train without dropout."""
    shuffle_dataset: bool = True
    """Shuffle the prompts."""
    ds3_gather_for_generation: bool = True
    """Gather ZeRO-3's weights to sample, which is fast and needs memory for the whole model."""

    @field_validator("reward_funcs")
    @classmethod
    def _check_rewards(cls, specs: list[Any]) -> list[Any]:
        check_rewards(specs)
        return specs

    @property
    def generated_tokens(self) -> int:
        """Tokens that follow a prompt."""
        return self.max_completion_length


def _keys(config: RunConfig) -> GrpoKeys:
    assert isinstance(config.stage_keys, GrpoKeys)  # noqa: S101 - the config was read with them
    return config.stage_keys


def _arguments(config: RunConfig) -> Arguments:
    from trl import GRPOConfig

    keys = _keys(config)
    scorers = make_rewards(keys.reward_funcs)
    values = keys.model_dump(exclude={"reward_funcs", *ReferenceKeys.model_fields})
    values |= {"reward_weights": [scorer.weight for scorer in scorers]}
    _, defaults = with_defaults(GRPOConfig, values)
    is_evaluated = bool(config.data.eval_dataset or config.data.val_size)

    def make(**given: Any) -> Any:
        try:
            args = GRPOConfig(**given)
        except ValueError as error:
            if "generation_batch_size" in str(error):
                raise InputError(_explain_batch(keys)) from error
            raise
        generations = args.num_generations_eval or args.num_generations
        rows = args.per_device_eval_batch_size * args.world_size
        if is_evaluated and rows % generations:
            raise InputError(
                f"per_device_eval_batch_size is {args.per_device_eval_batch_size}, on all "
                f"processes {rows}; expected a multiple of the {generations} answers to a prompt"
            )
        return args

    return make, defaults


def _explain_batch(keys: GrpoKeys) -> str:
    return (
        f"num_generations is {keys.num_generations}; expected a divisor of the answers that are "
        "sampled at a time: per_device_train_batch_size times gradient_accumulation_steps (or "
        "steps_per_generation) times the processes, over sequence_parallel_size"
    )


def _build(parts: Parts) -> Trainer:
    keys = _keys(parts.config)
    trainer = _trainer_class()(make_rewards(keys.reward_funcs), parts, keys.beta)
    return finish_trainer(trainer, parts.data)


@cache
def _trainer_class() -> Any:
    from ulysses_core.trainers.prompt_trainer import PromptTrainer

    class MeasuredGRPOTrainer(PromptTrainer):
        """A GRPOTrainer that also compares its own probabilities with its sampler's."""

        _log_probs: Any = None

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self._log_probs = found[0].detach()
            return found

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            ratios = measure_ratios(
                self._log_probs,
                inputs.get("old_per_token_logps", self._log_probs),
                inputs["sampling_per_token_logps"],
                inputs["completion_mask"],
                self.accelerator.gather,
            )
            for name, value in ratios.items():
                self._metrics[self.mode][name].append(value)
            return loss

    return MeasuredGRPOTrainer


STAGE = Stage(
    name="grpo",
    kind="prompts",
    keys=GrpoKeys,
    convert=to_prompt,
    tokenize=tokenize_prompts,
    make_arguments=_arguments,
    build_trainer=_build,
)
