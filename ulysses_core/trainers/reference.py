"""The keys of stages that compare the policy with a reference model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ulysses_core.data.config import Names
from ulysses_core.trainers.stage import Parts, StageKeys

__all__ = ["ReferenceKeys", "needs_reference"]


class ReferenceKeys(StageKeys):
    """Names another reference model than the one that training starts from."""

    ref_model: str | None = None
    """Folder (or hub name) of the reference. Default: what training starts from."""
    ref_model_adapters: Names = Field(default_factory=list)
    """Adapters to merge into `ref_model`."""
    ref_model_quantization_bit: Literal[4, 8] | None = None
    """Load `ref_model` in 4 or 8 bits."""

    @model_validator(mode="after")
    def _check_reference(self) -> ReferenceKeys:
        for key in ("ref_model_adapters", "ref_model_quantization_bit"):
            if getattr(self, key) and self.ref_model is None:
                raise ValueError(f"{key} is set without ref_model; set it, or remove {key}")
        return self


def needs_reference(parts: Parts) -> bool:
    """Whether the reference is a model of its own, not the one below the adapters."""
    keys = parts.config.stage_keys
    is_other = isinstance(keys, ReferenceKeys) and keys.ref_model is not None
    return is_other or not parts.config.finetuning.has_adapters
