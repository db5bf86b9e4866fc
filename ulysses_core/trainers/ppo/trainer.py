"""The PPO trainer: a policy with a value head, a reference, a reward model or reward functions.

A step of the loop, as in LLaMA-Factory::

    for each buffer of answers:                       # ppo_buffer_size optimizer steps
        answers = policy.generate(prompts)            # without sequence parallelism
        old log-probs, values = policy(answers)
        rewards = score - coefficient * divergence from the reference, per token
        advantages, returns = GAE(rewards, values)
        for each of ppo_epochs, for each micro-batch:
            loss = clipped policy loss + vf_coef * clipped value loss

Sampling, rewards and the buffer are TRL's GRPOTrainer's (see `PromptTrainer`), with one answer to
a prompt.

Legend: B answers of this process, P tokens of a prompt, T tokens of an answer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ulysses_core.rewards import Scorer
from ulysses_core.trainers.ppo.algorithm import (
    KlController,
    RunningMoments,
    estimate_advantages,
    explain_variance,
    policy_losses,
    reward_tokens,
    value_losses,
    whiten,
)
from ulysses_core.trainers.ppo.batch import Batch, join_answers, pad_answers
from ulysses_core.trainers.ppo.value_head import return_values
from ulysses_core.trainers.prompt_trainer import PromptTrainer
from ulysses_core.trainers.rollouts import measure_ratios
from ulysses_core.trainers.stage import Parts
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.integrations.rewards import bimodality

__all__ = ["PPOSettings", "PPOTrainer"]

_STATE = "ppo_state.json"
_REWARD_MODEL = "reward_model"


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """The numbers of PPO; see `PpoKeys` of stage `ppo`."""

    init_kl_coef: float
    target: float | None
    horizon: float
    gamma: float
    lam: float
    cliprange: float
    cliprange_value: float
    vf_coef: float
    score_norm: bool
    whiten_rewards: bool


class PPOTrainer(PromptTrainer):
    """Trains a policy with a value head; see the module.

    Args:
        scorers: reward functions; their weighted scores are added to the reward model's.
        parts: see `Parts`; the model has a value head.
        settings: the numbers of PPO.
        reward_model: a sequence classifier with one output, or None.
    """

    def __init__(
        self,
        scorers: list[Scorer],
        parts: Parts,
        settings: PPOSettings,
        reward_model: PreTrainedModel | None = None,
    ) -> None:
        others = [] if reward_model is None else [_REWARD_MODEL]
        super().__init__(scorers, parts, settings.init_kl_coef, others)
        self.settings = settings
        self.kl = KlController(settings.init_kl_coef, settings.target, settings.horizon)
        self.moments = RunningMoments()
        self.reward_model = None
        if reward_model is not None:
            self.reward_model = self.prepare_frozen(reward_model.requires_grad_(False).eval())
        return_values(self.base_model)

    # -- sampling --------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, answer_ids, _, texts, sampled, *_ = self._generate(prompts)
        batch = pad_answers(prompt_ids, answer_ids, sampled, self.processing_class.pad_token_id)
        batch = {name: rows.to(self.accelerator.device) for name, rows in batch.items()}
        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            batch["old"], _, values = self._run(self.model, batch)
            assert values is not None  # noqa: S101 - the model has a value head
            batch["values"] = values
            reference = self._run_reference(batch) if self.beta else batch["old"]
            scores = self._score(inputs, prompts, texts, answer_ids, batch)
        return batch | self._estimate(batch, batch["old"] - reference, scores)

    def _run(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns log-probabilities, entropies and values of an answer's tokens [B, T]."""
        ids, mask = join_answers(batch)
        length, size = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        found = []
        for rows in torch.arange(len(ids), device=ids.device).split(size):
            labels = ids[rows].masked_fill(mask[rows] == 0, -100)
            labels[:, :-length] = -100
            with self.accelerator.autocast():
                output = model(
                    input_ids=ids[rows],
                    attention_mask=mask[rows],
                    labels=labels,
                    fused_lm_head=True,
                )
            fields = (output.log_probs, output.entropy, getattr(output, "token_values", None))
            found.append([field if field is None else field[:, -length:] for field in fields])
        log_probs, *others = zip(*found, strict=True)
        entropy, values = (None if each[0] is None else torch.cat(each) for each in others)
        return torch.cat(log_probs), entropy, values

    def _run_reference(self, batch: Batch) -> Tensor:
        """Returns the reference model's log-probabilities [B, T]."""
        if self.ref_model is not None:
            return self._run(self.ref_model, batch)[0]
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            return self._run(self.model, batch)[0]

    def _score(
        self, inputs: Any, prompts: Any, texts: list[str], answers: list[list[int]], batch: Batch
    ) -> Tensor:
        """Returns the score of each answer [B], and logs the scores of all processes."""
        if self.reward_model is not None:
            self._scores[_REWARD_MODEL] = self._run_reward_model(batch).tolist()
        found = self._calculate_rewards(inputs, prompts, texts, answers)
        total = (found * self.reward_weights.to(found.device)).nansum(dim=1)
        for name, scores in zip(self.reward_func_names, found.unbind(1), strict=True):
            self._note_spread(scores, f"rewards/{name}/mean", f"rewards/{name}/std")
        self._note_spread(total, "reward", "reward_std")
        if (shape := bimodality(total.double().cpu().numpy())) is not None:
            self._note("reward_bimodality", shape)
        first = self.accelerator.process_index * len(texts)
        own: Tensor = total[first : first + len(texts)]
        return own

    def _run_reward_model(self, batch: Batch) -> Tensor:
        ids, mask = join_answers(batch)
        size = self.args.per_device_train_batch_size
        assert self.reward_model is not None  # noqa: S101 - the caller checks it
        scores = [
            self.reward_model(input_ids=ids[rows], attention_mask=mask[rows]).logits[:, 0]
            for rows in torch.arange(len(ids), device=ids.device).split(size)
        ]
        return torch.cat(scores).float()

    def _note_spread(self, scores: Tensor, mean: str, spread: str) -> None:
        known = scores[~scores.isnan()].double()
        self._note(mean, float(known.mean()) if len(known) else float("nan"))
        self._note(spread, float(known.std()) if len(known) > 1 else 0.0)

    # -- advantages ------------------------------------------------------------------------------

    def _estimate(self, batch: Batch, divergence: Tensor, scores: Tensor) -> Batch:
        """Returns advantages and returns [B, T] and the number of tokens of all processes."""
        mask, settings = batch["completion_mask"], self.settings
        values = batch["values"]
        if settings.score_norm:
            scores = self._normalise(scores)
        rewards = reward_tokens(scores, divergence, mask, self.kl.coefficient)
        if settings.whiten_rewards:
            rewards = whiten(rewards, *self._measure(rewards, mask), shift=False) * mask
        advantages = estimate_advantages(
            rewards, values, mask, gamma=settings.gamma, lam=settings.lam
        )
        returns = advantages + values
        count = self._sum(mask)
        self._note_rollout(batch, returns, divergence, count)
        whitened = whiten(advantages, *self._measure(advantages, mask)) * mask
        return {"advantages": whitened, "returns": returns, "num_items_in_batch": count}

    def _normalise(self, scores: Tensor) -> Tensor:
        mean, variance = self._measure(scores, torch.ones_like(scores))
        if self.mode == "train":
            count = len(scores) * self.accelerator.num_processes
            self.moments.update(float(mean), float(variance), count)
        return self.moments.normalise(scores)

    def _note_rollout(
        self, batch: Batch, returns: Tensor, divergence: Tensor, count: Tensor
    ) -> None:
        mask, answers = batch["completion_mask"], len(returns) * self.accelerator.num_processes
        total = float(self._sum(divergence * mask))
        _, error = self._measure(returns - batch["values"], mask)
        _, spread = self._measure(returns, mask)
        self._note("kl", total / max(float(count), 1.0))
        self._note("kl_per_answer", total / answers)
        self._note("kl_coef", self.kl.coefficient)
        self._note("explained_variance", explain_variance(float(error), float(spread)))
        if self.mode == "train":
            self.kl.update(total / answers, answers)

    def _sum(self, values: Tensor) -> Tensor:
        """Returns the sum over the values of all processes."""
        total: Tensor = self.accelerator.reduce(values.double().sum(), reduction="sum")
        return total

    def _measure(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and variance of the masked values of all processes."""
        count = self._sum(mask).clamp(min=1)
        mean = self._sum(values * mask) / count
        return mean, self._sum((values - mean).square() * mask) / count

    # -- loss ------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        log_probs, entropy, values = self._run(model, inputs)
        assert entropy is not None and values is not None  # noqa: S101, PT018 - see value_head
        mask, settings = inputs["completion_mask"], self.settings
        policy, is_clipped = policy_losses(
            log_probs - inputs["old"], inputs["advantages"], settings.cliprange
        )
        value = value_losses(values, inputs["values"], inputs["returns"], settings.cliprange_value)
        count = self._sum(mask).clamp(min=1)
        for name, each in (
            ("policy_loss", policy),
            ("value_loss", value),
            ("entropy", entropy),
            ("clip_ratio/region_mean", is_clipped),
        ):
            self._note(name, float(self._sum(each.detach() * mask) / count))
        ratios = measure_ratios(
            log_probs.detach(), inputs["old"], inputs["sampled"], mask, self.accelerator.gather
        )
        for name, ratio in ratios.items():
            self._note(name, ratio)
        total = ((policy + settings.vf_coef * value) * mask).sum()
        loss: Tensor = total / self._normalizer(inputs["num_items_in_batch"])
        return loss.to(log_probs.dtype)

    def _normalizer(self, count: Tensor) -> Tensor:
        """Returns the tokens of a micro-batch times those that a step accumulates, on average.

        The engine averages over processes, so a step's loss is a mean over its tokens.
        """
        normalizer: Tensor = count.clamp(min=1) / self.accelerator.num_processes
        if self.mode == "train":  # an evaluation neither splits nor accumulates its batch
            accumulated = self.current_gradient_accumulation_steps
            normalizer = normalizer * accumulated / self.args.steps_per_generation
        return normalizer

    def _note(self, name: str, value: float) -> None:
        self._metrics[self.mode][name].append(value)

    # -- checkpoints -----------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            path = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" / _STATE
            state = {"kl_coef": self.kl.coefficient, "moments": asdict(self.moments)}
            path.write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "") / _STATE
        if checkpoint is None or not path.is_file():
            return
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            self.kl.coefficient = float(state["kl_coef"])
            self.moments = RunningMoments(**state["moments"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the state of a PPO training: {error}") from error
