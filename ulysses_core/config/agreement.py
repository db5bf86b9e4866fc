"""Checks keys of different sections of a config against one another."""

from __future__ import annotations

from collections.abc import Iterator

from ulysses_core.config.schema import RunConfig
from ulysses_core.lora.inits import needs_rows
from ulysses_monitor.common.errors import InputError

__all__ = ["check_agreement"]

_TAKES_BASE = ("ppo", "grpo")
"""Stages whose reference is the base without its adapters."""


def check_agreement(config: RunConfig, where: str) -> None:
    """Checks a config as a whole.

    Raises:
        InputError: two keys contradict one another.
    """
    for problem in (*_find_work(config), *_find_adapters(config), *_find_optimizer(config)):
        raise InputError(f"{where}: {problem}")


def _find_work(config: RunConfig) -> Iterator[str]:
    settings, data = config.settings, config.data
    if not (settings.do_train or settings.do_eval):
        yield "do_train is false; set do_eval: true to evaluate, or remove do_train"
    if settings.do_eval and not (data.eval_dataset or data.val_size):
        yield "do_eval is true, but there is no data to evaluate on; set eval_dataset or val_size"


def _find_adapters(config: RunConfig) -> Iterator[str]:
    names, finetuning = config.model.adapter_name_or_path, config.finetuning
    if names and not finetuning.has_adapters:
        yield (
            "adapter_name_or_path is for finetuning_type lora and oft; finetuning_type is "
            f"{finetuning.finetuning_type}, so remove it"
        )
    if finetuning.create_new_adapter and not names:
        yield "create_new_adapter is true without adapter_name_or_path; set it, or remove the key"
    if config.model.adapter_folder is not None and not names:
        yield "adapter_folder is set without adapter_name_or_path; set it, or remove the key"
    is_new = not names or finetuning.create_new_adapter
    if not is_new and finetuning.init != "default":
        yield (
            f"lora_init is {finetuning.init}, but training continues {names[-1]}; remove it, or "
            "set create_new_adapter"
        )
    takes_base = finetuning.stage in _TAKES_BASE and getattr(config.stage_keys, "beta", 1) > 0
    if takes_base and not is_new:
        yield (
            f"adapter_name_or_path is set, and stage {finetuning.stage} takes the base below the "
            "adapters as its reference; set create_new_adapter: true, which merges them into it"
        )
    if is_new and needs_rows(finetuning.init) and finetuning.finetuning_type == "lora":
        zero = (config.deepspeed or {}).get("zero_optimization", {})
        if zero.get("stage") == 3:
            yield (
                f"lora_init is {finetuning.init}, which runs the whole model before training "
                "starts, and ZeRO-3 cuts it as it is loaded; use zero2, or lora_init: default"
            )
    if takes_base and finetuning.changes_base:
        yield (
            f"lora_init is {finetuning.init}, which changes the base, and stage "
            f"{finetuning.stage} takes the base as its reference; use lora_init: default"
        )


def _find_optimizer(config: RunConfig) -> Iterator[str]:
    finetuning = config.finetuning
    if finetuning.loraplus_lr_ratio is not None and "optimizer" in (config.deepspeed or {}):
        yield (
            "loraplus_lr_ratio is set, but the DeepSpeed settings name an optimizer, which knows "
            "no groups; remove it from them"
        )
    if finetuning.early_stopping_steps is not None:
        strategy = config.training.get("eval_strategy", "no")
        if str(getattr(strategy, "value", strategy)) == "no":
            yield "early_stopping_steps needs evaluations; set eval_strategy to steps or epoch"
    steps = config.training.get("gradient_checkpointing")
    if steps and config.raw.get("disable_gradient_checkpointing") is True:
        yield (
            "disable_gradient_checkpointing and gradient_checkpointing are both true; keep one of "
            "them"
        )
