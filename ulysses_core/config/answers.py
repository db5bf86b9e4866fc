"""Settings for looking at a model's answers while it trains."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["AnswersConfig"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class AnswersConfig(BaseModel):
    """What to answer during a training, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    predict_with_generate: bool = False
    """Answer the held-out prompts in each evaluation and compare with the references (`sft`)."""
    max_new_tokens: int = Field(default=1024, gt=0)
    """The longest answer, in tokens."""
    sample_answers_every: int | None = Field(default=None, gt=0)
    """Record answers to a few fixed prompts every so many steps, and before and after training."""
    sample_prompts: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    """These prompts. `sft` has a default: the first three held-out rows, or training rows."""
