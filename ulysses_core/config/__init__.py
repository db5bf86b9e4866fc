"""Reads and validates training configs."""

from ulysses_core.config.finetuning import FinetuningConfig
from ulysses_core.config.load import load_config
from ulysses_core.config.schema import (
    ModelConfig,
    MonitorConfig,
    RunConfig,
    RunSettings,
)

__all__ = [
    "FinetuningConfig",
    "ModelConfig",
    "MonitorConfig",
    "RunConfig",
    "RunSettings",
    "load_config",
]
