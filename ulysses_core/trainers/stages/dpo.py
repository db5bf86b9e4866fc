"""Stage `dpo`: preference pairs, with TRL's DPOTrainer (arXiv 2305.18290) and `pref_loss`.

`sigmoid`, `hinge` and `ipo` compare the policy with a reference model: the frozen base below the
adapters, or a second model in full fine-tuning. `orpo` and `simpo` need none. With the mean
log-probability of an answer's tokens, c of the chosen and r of the rejected one, their losses are

- ORPO (arXiv 2403.07691): -c - beta * log sigmoid(odds(c) - odds(r)), odds(x) = x - log(1 - e^x)
- SimPO (arXiv 2405.14734): -log sigmoid(beta * (c - r) - simpo_gamma)

Legend: B pairs, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ulysses_core.config import RunConfig
from ulysses_core.data.examples import to_pair
from ulysses_core.data.preferences import tokenize_pairs
from ulysses_core.trainers.reference import ReferenceKeys, needs_reference
from ulysses_core.trainers.stage import (
    Arguments,
    Parts,
    Stage,
    finish_trainer,
    with_defaults,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

__all__ = ["STAGE", "DpoKeys", "odds_ratio_loss", "simpo_loss"]

_WITHOUT_REFERENCE = ("orpo", "simpo")


class DpoKeys(ReferenceKeys):
    """The keys of stage `dpo`."""

    pref_loss: Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"] = "sigmoid"
    """The loss."""
    pref_beta: float = Field(default=0.1, gt=0)
    """How strongly the reference model holds the policy back; in ORPO the weight of the odds."""
    pref_ftx: float = Field(default=0.0, ge=0)
    """Adds this times the mean loss of the chosen answers' tokens."""
    dpo_label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose preference is taken to be wrong; with `sigmoid`."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """Margin by which SimPO wants the chosen answer to be more likely."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the tokens beyond the shorter answer's length; None for 1."""

    @model_validator(mode="after")
    def _check_together(self) -> DpoKeys:
        if self.pref_loss in _WITHOUT_REFERENCE and (self.pref_ftx or self.ld_alpha is not None):
            raise ValueError(
                f"pref_loss is {self.pref_loss}, which takes neither pref_ftx nor ld_alpha; "
                "remove them"
            )
        if self.pref_loss in _WITHOUT_REFERENCE and self.ref_model is not None:
            raise ValueError(
                f"pref_loss is {self.pref_loss}, which has no reference model; remove ref_model"
            )
        if self.dpo_label_smoothing and self.pref_loss != "sigmoid":
            raise ValueError(
                f"dpo_label_smoothing is {self.dpo_label_smoothing}, which only pref_loss sigmoid "
                "takes; remove it"
            )
        return self


def _keys(config: RunConfig) -> DpoKeys:
    assert isinstance(config.stage_keys, DpoKeys)  # noqa: S101 - the config was read with them
    return config.stage_keys


def _arguments(config: RunConfig) -> Arguments:
    from trl import DPOConfig

    keys = _keys(config)
    values: dict[str, Any] = {"beta": keys.pref_beta, "max_length": None}  # rows are truncated
    if keys.pref_loss in _WITHOUT_REFERENCE:
        values["precompute_ref_log_probs"] = True  # of which the trainer then makes none
    else:
        values |= {
            "loss_type": [keys.pref_loss, *(["sft"] if keys.pref_ftx else [])],
            "loss_weights": [1.0, *([keys.pref_ftx] if keys.pref_ftx else [])],
            "label_smoothing": keys.dpo_label_smoothing,
            "ld_alpha": keys.ld_alpha,
        }
    return with_defaults(DPOConfig, values)


def _build(parts: Parts) -> Trainer:
    keys = _keys(parts.config)
    is_free = keys.pref_loss in _WITHOUT_REFERENCE
    trainer = _trainer_classes()[is_free](
        model=parts.model,
        ref_model=parts.make_reference() if not is_free and needs_reference(parts) else None,
        args=parts.args,
        train_dataset=parts.data.train,
        eval_dataset=parts.data.eval,
        processing_class=parts.tokenizer,
    )
    trainer.pref_keys = keys
    return finish_trainer(trainer, parts.data)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Returns ORPO's loss of each pair [B] from mean log-probabilities [B]; see the module."""
    import torch
    import torch.nn.functional as F

    odds = [x - torch.log1p(-torch.exp(x)) for x in (chosen, rejected)]
    return -chosen - beta * F.logsigmoid(odds[0] - odds[1])


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """Returns SimPO's loss of each pair [B] from mean log-probabilities [B]; see the module."""
    import torch.nn.functional as F

    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@cache
def _trainer_classes() -> tuple[Any, Any]:
    """Returns the trainers with and without a reference model, for rows that are tokenised."""
    from trl import DPOTrainer

    class TokenisedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class ReferenceFreeTrainer(TokenisedDPOTrainer):
        pref_keys: DpoKeys

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _compute_loss(
            self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool
        ) -> Any:
            mask = inputs["completion_mask"]
            labels = inputs["input_ids"].masked_fill(mask == 0, -100)
            rows = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            outputs = model(**rows, labels=labels, fused_lm_head=True, use_cache=False)
            summed = outputs.log_probs.sum(dim=1)  # 0 where there is no answer
            chosen, rejected = (summed / mask[:, 1:].sum(dim=1).clamp(min=1)).chunk(2)
            keys = self.pref_keys
            if keys.pref_loss == "orpo":
                losses = odds_ratio_loss(chosen, rejected, keys.pref_beta)
            else:
                losses = simpo_loss(chosen, rejected, keys.pref_beta, keys.simpo_gamma)
            self._record(chosen.detach(), rejected.detach(), keys.pref_beta)
            return (losses.mean(), outputs) if return_outputs else losses.mean()

        def _record(self, chosen: Tensor, rejected: Tensor, beta: float) -> None:
            """Logs what DPO logs, with rewards of beta times the mean log-probability."""
            numbers = {
                "rewards/chosen": beta * chosen,
                "rewards/rejected": beta * rejected,
                "rewards/margins": beta * (chosen - rejected),
                "rewards/accuracies": (chosen > rejected).float(),
                "logps/chosen": chosen,
                "logps/rejected": rejected,
            }
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, values in numbers.items():
                metrics[name].append(self.accelerator.gather(values).mean().item())

    return TokenisedDPOTrainer, ReferenceFreeTrainer


STAGE = Stage(
    name="dpo",
    kind="pairs",
    keys=DpoKeys,
    convert=to_pair,
    tokenize=tokenize_pairs,
    make_arguments=_arguments,
    build_trainer=_build,
)
