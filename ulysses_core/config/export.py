"""The keys of `ulysses export`, with LLaMA-Factory's names and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["ExportConfig"]


class ExportConfig(BaseModel):
    """Where and how to save a merged model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    export_dir: Path | None = None
    """The folder to save in."""
    export_size: int = Field(default=5, gt=0)
    """Largest size of a file of weights, in GB."""
    export_device: Literal["cpu", "auto"] = "cpu"
    """Merge on the CPU, or on a GPU if there is one."""
    export_legacy_format: bool = False
    """`.bin` files, which transformers 5 does not write: only false is allowed."""
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """The dtype to save; `auto` keeps the stored one."""

    @field_validator("export_legacy_format")
    @classmethod
    def _check_format(cls, is_legacy: bool) -> bool:
        if is_legacy:
            raise ValueError(
                "true is not served, because transformers 5 saves safetensors only; remove it"
            )
        return is_legacy
