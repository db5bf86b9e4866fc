"""Loads a reward model that stage `rm` trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ulysses_core.config import RunConfig
from ulysses_core.trainers.adapters import first_line
from ulysses_core.trainers.build import build_reference
from ulysses_core.trainers.stage import NoKeys
from ulysses_monitor.common.errors import InputError

__all__ = ["load_reward_model"]


def load_reward_model(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    device: torch.device,
    *,
    is_adapter: bool,
) -> Any:
    """Returns a frozen sequence classifier with one output.

    Args:
        config: the config, whose model is the base of the adapters.
        tokenizer: the policy's tokenizer, whose token ids the reward model gets.
        path: the folder (or hub name).
        device: where tensors are that the process group communicates.
        is_adapter: whether it has adapters, with the head, and no whole model.

    Raises:
        InputError: it cannot be loaded.
    """
    source: dict[str, Any] = {"adapter_name_or_path": []}
    if not is_adapter:
        source |= {"model_name_or_path": path, "architecture": None, "train_from_scratch": False}
    # Not the keys of the stage, whose `ref_model` would be loaded instead.
    config = replace(config, model=config.model.model_copy(update=source), stage_keys=NoKeys())
    model = build_reference(config, tokenizer, "score", device)
    if is_adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, path)
        except (OSError, ValueError, RuntimeError) as error:
            line = first_line(error)
            raise InputError(
                f"reward_model {path}: cannot load adapters: {line}; for a whole model set "
                "reward_model_type to full"
            ) from error
    return model.requires_grad_(False).eval()
