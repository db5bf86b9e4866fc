"""Trains Hugging Face models on long sequences: Ulysses attention, DeepSpeed ZeRO, LoRA."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_core.lora import init_lora
    from ulysses_core.memory import save_memory
    from ulysses_core.parallel import sequence_parallel
    from ulysses_core.trainers import UlyssesTrainingManager

# Imported when asked for: all need transformers.
_HOMES = {
    "UlyssesTrainingManager": "trainers",
    "init_lora": "lora",
    "save_memory": "memory",
    "sequence_parallel": "parallel",
}

__all__ = ["UlyssesTrainingManager", "init_lora", "save_memory", "sequence_parallel"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ulysses_core.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
