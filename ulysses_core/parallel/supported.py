"""Which Trainers and models sequence parallelism supports, and with which attention kernel."""

from __future__ import annotations

from transformers import PreTrainedModel, Trainer

from ulysses_core.parallel.kernels import choose_kernel
from ulysses_monitor.common.errors import InputError

__all__ = ["choose_trainer_kernel", "unwrap_model"]


def unwrap_model(trainer: Trainer) -> PreTrainedModel:
    """Returns the transformers model inside the Trainer's model, without a PEFT wrapper."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"sequence parallel: the model is a {type(model).__name__}; expected a "
            "transformers.PreTrainedModel, with or without PEFT adapters"
        )
    return model


def choose_trainer_kernel(trainer: Trainer) -> str:
    """Chooses the attention kernel, and refuses settings that do not work on slices of rows."""
    args = trainer.args
    if args.label_smoothing_factor:
        raise InputError(
            f"sequence parallel: label_smoothing_factor is {args.label_smoothing_factor}; "
            "expected 0"
        )
    model = unwrap_model(trainer)
    name, config = type(model).__name__, model.config
    if not trainer.model_accepts_loss_kwargs:
        raise InputError(
            f"sequence parallel: the loss of {name} does not accept num_items_in_batch; "
            "use a model whose forward accepts it"
        )
    if trainer.compute_loss_func is not None:
        raise InputError("sequence parallel: compute_loss_func would see slices of rows; remove it")
    if not model._supports_attention_backend:
        raise InputError(
            f"sequence parallel: {name} does not support other attention implementations; "
            "use a model that does"
        )
    if getattr(config, "output_router_logits", False):
        raise InputError(
            "sequence parallel: output_router_logits is true, but the router's balance loss would "
            "see slices of rows; set it to false"
        )
    return choose_kernel(
        config._attn_implementation,
        has_softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        device=args.device,
        is_half=args.bf16 or args.fp16 or model.dtype.itemsize == 2,
    )
