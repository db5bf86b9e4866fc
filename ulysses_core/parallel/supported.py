"""Which Trainers and models sequence parallelism supports, and with which attention kernel."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, Trainer

from ulysses_core.parallel.families.allowed import check_family
from ulysses_core.parallel.kernels import choose_kernel
from ulysses_monitor.common.errors import InputError

__all__ = ["check_model", "check_trainer", "choose_trainer_kernel", "unwrap_peft"]


def unwrap_peft(model: Any) -> PreTrainedModel:
    """Returns the transformers model inside a PEFT wrapper, or `model` itself.

    Raises:
        InputError: it is not a model of transformers.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"sequence parallel: the model is a {type(model).__name__}; expected a "
            "transformers.PreTrainedModel, with or without PEFT adapters"
        )
    return model


def check_trainer(trainer: Trainer) -> None:
    """Refuses settings of a Trainer that do not work on slices of rows.

    Raises:
        InputError: the setting, and what to change.
    """
    if trainer.args.label_smoothing_factor:
        raise InputError(
            "sequence parallel: label_smoothing_factor is "
            f"{trainer.args.label_smoothing_factor}; expected 0"
        )
    if trainer.compute_loss_func is not None:
        raise InputError(
            "sequence parallel: compute_loss_func needs the logits of whole rows; remove it"
        )


def check_model(trainer: Trainer) -> frozenset[str]:
    """Refuses a model whose family or options were not shown to train rightly on slices of rows.

    Returns:
        The kinds of rows that the family takes; see `Family.rows`.

    Raises:
        InputError: the model is not on the list.
    """
    return check_family(unwrap_peft(trainer.accelerator.unwrap_model(trainer.model)).config).rows


def choose_trainer_kernel(trainer: Trainer) -> str:
    """Chooses the attention kernel of the Trainer's model.

    Raises:
        InputError: the model does not work on slices of rows.
    """
    args = trainer.args
    model = unwrap_peft(trainer.accelerator.unwrap_model(trainer.model))
    config = model.config
    if getattr(config, "output_router_logits", False):
        raise InputError(
            "sequence parallel: output_router_logits is true, but the router's balance loss would "
            "see slices of rows; set it to false"
        )
    return choose_kernel(
        config._attn_implementation,
        has_softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        has_sinks=any(name.endswith(".sinks") for name, _ in model.named_parameters()),
        device=args.device,
        is_half=args.bf16 or args.fp16 or model.dtype.itemsize == 2,
    )
