"""Reads and validates training configs."""

from ulysses_core.config.load import load_config
from ulysses_core.config.schema import (
    FinetuningConfig,
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
