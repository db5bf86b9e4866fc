"""Stage `ppo`: proximal policy optimisation (arXiv 1707.06347) with a value head.

The policy is held near the model that training starts from. A reward model, as stage `rm` trains
it, or reward functions score the answers. Keys that LLaMA-Factory has keep its names and defaults;
those of the algorithm have the names and defaults of TRL's former PPOTrainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ulysses_core.config import RunConfig
from ulysses_core.data.prompts import to_prompt, tokenize_prompts
from ulysses_core.rewards import check_rewards, make_rewards
from ulysses_core.trainers.stage import (
    Arguments,
    Parts,
    Stage,
    StageKeys,
    finish_trainer,
    with_defaults,
)
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["STAGE", "PpoKeys"]


class PpoKeys(StageKeys):
    """The keys of stage `ppo`."""

    reward_model: str | None = None
    """Folder (or hub name) of a model that stage `rm` trained; its tokenizer is the policy's."""
    reward_model_type: Literal["full", "lora"] = "lora"
    """Whether that folder has a whole model, or adapters of the policy's base."""
    reward_funcs: list[Any] = Field(default_factory=list)
    """Rewards that are added to the reward model's; see stage `grpo`."""
    ppo_buffer_size: int = Field(default=1, gt=0)
    """Batches of an optimizer step that are sampled at a time."""
    ppo_epochs: int = Field(default=4, gt=0)
    """Times that answers are trained on."""
    ppo_score_norm: bool = False
    """Normalise scores by the mean and spread of all scores so far."""
    ppo_target: float = Field(default=6.0, gt=0)
    """Divergence of an answer from the reference that the adaptive control holds, in nats."""
    ppo_whiten_rewards: bool = False
    """Scale the rewards of tokens to a spread of 1 before advantages are computed."""
    max_new_tokens: int = Field(default=256, gt=0)
    """Largest number of tokens of an answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; log-probabilities are computed at the same temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that have this probability together."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most likely tokens; 0 for all."""
    init_kl_coef: float = Field(default=0.2, ge=0)
    """Cost of the divergence from the reference model at first; 0 loads none."""
    adap_kl_ctrl: bool = True
    """Adapt the cost to hold `ppo_target` (arXiv 1909.08593); false keeps it."""
    horizon: float = Field(default=10000, gt=0)
    """Answers over which the cost adapts."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of later rewards."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Weight of longer advantage estimates (arXiv 1506.02438)."""
    cliprange: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may leave 1 before its loss is clipped."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """How far a value may move before its loss is clipped."""
    vf_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss."""
    shuffle_dataset: bool = True
    """Shuffle the prompts."""
    ds3_gather_for_generation: bool = True
    """Gather ZeRO-3's weights to sample, which is fast and needs memory for the whole model."""

    @field_validator("reward_funcs")
    @classmethod
    def _check_rewards(cls, specs: list[Any]) -> list[Any]:
        check_rewards(specs)
        return specs

    @model_validator(mode="after")
    def _check_together(self) -> PpoKeys:
        if self.reward_model is None and not self.reward_funcs:
            raise ValueError("neither reward_model nor reward_funcs is set; set one of them")
        return self

    @property
    def generated_tokens(self) -> int:
        """Tokens that follow a prompt."""
        return self.max_new_tokens


def _keys(config: RunConfig) -> PpoKeys:
    assert isinstance(config.stage_keys, PpoKeys)  # noqa: S101 - the config was read with them
    return config.stage_keys


def _arguments(config: RunConfig) -> Arguments:
    from ulysses_core.trainers.ppo.config import PPOConfig

    keys = _keys(config)
    _check_reward_model(keys)
    scorers = make_rewards(keys.reward_funcs) if keys.reward_funcs else []
    names = ("temperature", "top_p", "top_k", "shuffle_dataset", "ds3_gather_for_generation")
    accumulated = config.training.get("gradient_accumulation_steps", 1)
    values = {name: getattr(keys, name) for name in names} | {
        "beta": keys.init_kl_coef,
        "max_completion_length": keys.max_new_tokens,
        "num_iterations": keys.ppo_epochs,
        "steps_per_generation": accumulated * keys.ppo_buffer_size,
        "reward_weights": [
            *(scorer.weight for scorer in scorers),
            *([] if keys.reward_model is None else [1.0]),
        ],
    }
    return with_defaults(PPOConfig, values)


def _check_reward_model(keys: PpoKeys) -> None:
    name = keys.reward_model
    if name is not None and name.count("/") != 1 and not Path(name).is_dir():
        raise InputError(
            f"reward_model is {name!r}, but there is no such folder; expected a folder with a "
            "model of stage rm"
        )


def _build(parts: Parts) -> Trainer:
    from ulysses_core.trainers.ppo.reward_model import load_reward_model
    from ulysses_core.trainers.ppo.trainer import PPOSettings, PPOTrainer

    keys, reward_model = _keys(parts.config), None
    if keys.reward_model is not None:
        reward_model = load_reward_model(
            parts.config,
            parts.tokenizer,
            keys.reward_model,
            parts.args.device,
            is_adapter=keys.reward_model_type == "lora",
        )
    trainer = PPOTrainer(
        make_rewards(keys.reward_funcs) if keys.reward_funcs else [],
        parts,
        PPOSettings(
            target=keys.ppo_target if keys.adap_kl_ctrl else None,
            score_norm=keys.ppo_score_norm,
            whiten_rewards=keys.ppo_whiten_rewards,
            **keys.model_dump(include={"init_kl_coef", "horizon", "gamma", "lam"}),
            **keys.model_dump(include={"cliprange", "cliprange_value", "vf_coef"}),
        ),
        reward_model,
    )
    return finish_trainer(trainer, parts.data)


STAGE = Stage(
    name="ppo",
    kind="prompts",
    keys=PpoKeys,
    task="value",
    convert=to_prompt,
    tokenize=tokenize_prompts,
    make_arguments=_arguments,
    build_trainer=_build,
)
