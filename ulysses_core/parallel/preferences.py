"""Sequence parallelism for TRL's ORPO and CPO trainers, which compute their loss from logits.

What they need of the logits are the log-probabilities of the rows' own tokens. So their one call of
the model asks TRL's fused head for these, as TRL's DPO trainer does; they are gathered, [B, S - 1].
All that TRL computes from them (odds ratio, CPO, SimPO, AlphaPO, rewards) runs unchanged.

Legend: B rows, the chosen ones before the rejected ones; S tokens of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["check_pairs", "find_pair_trainer", "serve_log_probs"]

logger = logging.getLogger(__name__)

_TRAINERS = ("ORPOTrainer", "CPOTrainer")
_OF_LOGITS = "logits/"


def find_pair_trainer(trainer: Any) -> type | None:
    """Returns TRL's class, ORPOTrainer or CPOTrainer, that a trainer is of; None for any other."""
    for kind in type(trainer).__mro__:
        if kind.__name__ in _TRAINERS and kind.__module__.startswith("trl."):
            return kind
    return None


def check_pairs(trainer: Any) -> None:
    """Refuses what an ORPO or CPO trainer cannot do on slices of rows.

    Raises:
        InputError: the setting, and what to change.
    """
    kind: Any = find_pair_trainer(trainer)
    where = f"sequence parallel: {kind.__name__}"
    if type(trainer).concatenated_forward is not kind.concatenated_forward:
        raise InputError(
            f"{where}: {type(trainer).__name__} has its own concatenated_forward, which reads the "
            "logits of whole rows, and no rank holds them; remove it"
        )
    if trainer.is_encoder_decoder:
        raise InputError(f"{where}: the model is an encoder-decoder; expected a causal model")
    if trainer.aux_loss_enabled:
        raise InputError(
            f"{where}: output_router_logits was true when the trainer was made, but the router's "
            "balance loss would see slices of rows; set it to false in the model's config first"
        )


def serve_log_probs(trainer: Any, model: Any) -> Undo:
    """Makes an ORPO or CPO trainer ask its model for log-probabilities instead of logits.

    Args:
        trainer: the trainer.
        model: its model, without PEFT around it.
    """
    if trainer.is_world_process_zero():
        logger.warning(
            "sequence parallel: logits/chosen and logits/rejected are not logged: %s averages the "
            "logits of whole rows and of their padding, which no rank holds",
            type(trainer).__name__,
        )
    served = _LogProbs(trainer, is_orpo=_is_orpo(trainer))
    undos = [
        _add_fused_head(model),
        patch_method(trainer, "concatenated_forward", served.run_pairs),
        patch_method(trainer, "store_metrics", served.store_metrics),
    ]
    return lambda: undo_all(undos)


def _is_orpo(trainer: Any) -> bool:
    kind = find_pair_trainer(trainer)
    return kind is not None and kind.__name__ == "ORPOTrainer"


def _add_fused_head(model: Any) -> Undo:
    """Adds TRL's fused head so that it can be taken off again, whoever wraps the model later."""
    from trl.trainer.utils import add_fused_lm_head

    before = vars(model).get("forward")
    add_fused_lm_head(model)
    fused = vars(model)["forward"]
    if before is None:
        del model.forward
    else:
        model.forward = before

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return (fused if kwargs.get("fused_lm_head") else original)(*args, **kwargs)

    return patch_method(model, "forward", forward)


class _LogProbs:
    """Wrappers of an ORPO or CPO trainer's methods."""

    def __init__(self, trainer: Any, *, is_orpo: bool) -> None:
        self._trainer, self._is_orpo = trainer, is_orpo

    def run_pairs(
        self,
        original: Callable[..., Any],  # noqa: ARG002 - it asks for the logits of whole rows
        model: Any,
        batch: Mapping[str, Any],
    ) -> tuple[Tensor, ...]:
        """Returns what TRL's `concatenated_forward` does, with NaN in place of logits.

        These are the log-probabilities of the chosen and the rejected answers, each [B / 2], the
        logits of both, and the mean loss of the chosen rows' tokens: in ORPO of prompt and answer,
        in CPO of the answer.
        """
        trainer = self._trainer
        rows = trainer.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=trainer.padding_value if self._is_orpo else trainer.pad_token_id,
            device=trainer.accelerator.device,
        )
        ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
        of_answers, chosen = rows["concatenated_labels"], len(batch["chosen_labels"])
        labels = ids.masked_fill(mask != 1, IGNORE_INDEX) if self._is_orpo else of_answers
        output = model(
            input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False
        )
        is_answer = of_answers[:, 1:] != IGNORE_INDEX
        answers = (output.log_probs * is_answer).sum(dim=1)
        if self._is_orpo or trainer.loss_type in ("ipo", "simpo"):
            answers = answers / is_answer.sum(dim=1)
        loss = -output.log_probs[:chosen].sum() / output.label_mask[:chosen].sum()
        if not self._is_orpo and trainer.cpo_alpha == 0:
            loss = torch.zeros_like(loss)
        logits = torch.full_like(answers, torch.nan)
        return answers[:chosen], answers[chosen:], logits[:chosen], logits[chosen:], loss

    def store_metrics(
        self, original: Callable[..., Any], metrics: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        """Leaves the means of logits out."""
        names = [name for name in metrics if _OF_LOGITS not in name]
        original({name: metrics[name] for name in names}, *args, **kwargs)
