"""`ulysses generate`: samples answers with a model and writes them as datasets."""

from __future__ import annotations

from ulysses_core.generate.config import GenerateConfig, load_generate_config
from ulysses_core.generate.job import check_job, generate

__all__ = ["GenerateConfig", "check_job", "generate", "load_generate_config"]
