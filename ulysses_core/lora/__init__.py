"""LoRA: initialisations by name, adapters that start from others, and what is saved."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_core.lora.init import init_lora

# Imported when asked for: it needs torch.
_HOMES = {"init_lora": "init"}

__all__ = ["init_lora"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ulysses_core.lora.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
