"""LoRA+ (arXiv 2402.12354): B learns at a multiple of A's learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ulysses_core.config import FinetuningConfig
from ulysses_monitor.common.patching import Undo, patch_method

__all__ = ["use_loraplus"]


def use_loraplus(trainer: Any, config: FinetuningConfig) -> Undo:
    """Makes `trainer` create its optimizer with PEFT's groups of LoRA+.

    Args:
        trainer: a Trainer that has no optimizer yet; the kind of optimizer stays its own.
        config: with `loraplus_lr_ratio`.

    Returns:
        A function that undoes it.
    """
    from peft.optimizers import create_loraplus_optimizer

    def create(_: Callable[..., Any], model: Any = None) -> Any:
        if trainer.optimizer is None:
            model = trainer.model if model is None else model
            kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
            trainer.optimizer = create_loraplus_optimizer(
                model,
                kind,
                loraplus_lr_ratio=config.loraplus_lr_ratio,
                loraplus_lr_embedding=config.loraplus_lr_embedding,
                loraplus_weight_decay=trainer.args.weight_decay,
                **settings,
            )
            groups = trainer.optimizer.param_groups  # DeepSpeed takes no empty ones
            groups[:] = [group for group in groups if group["params"]]
        return trainer.optimizer

    return patch_method(trainer, "create_optimizer", create)
