"""Settings of the data pipeline, with LLaMA-Factory's names and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["DataConfig"]


def _split_names(value: object) -> object:
    if value is None:
        return []
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


Names = Annotated[list[str], BeforeValidator(_split_names)]


class DataConfig(BaseModel):
    """Which datasets to read, and how to turn their rows into tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: str | None = None
    """Name of the chat template. None uses the tokenizer's own, or `default` if it has none."""
    dataset: Names = Field(default_factory=list)
    """Names in `dataset_info.json` to train on: a list, or a comma-separated string."""
    eval_dataset: Names = Field(default_factory=list)
    """Names in `dataset_info.json` to evaluate on."""
    dataset_dir: Path = Path("data")
    """Folder with `dataset_info.json` and the files that it names."""
    cutoff_len: int = Field(default=2048, gt=0)
    """Maximum length of a row, in tokens."""
    train_on_prompt: bool = False
    """Train on the tokens of prompts too."""
    mask_history: bool = False
    """Train only on the last answer of a conversation."""
    packing: bool | None = None
    """Put several documents in one row. None means true for `pt` and false for `sft`."""
    neat_packing: bool = False
    """Pack, and keep attention within each document.

    In packed `sft` rows attention never crosses documents; in `pt` rows it does unless this is set.
    """
    val_size: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Held-out part of `dataset` for evaluation: a fraction below 1, or a number of examples."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first `max_samples` examples of each dataset."""
    default_system: str | None = None
    """System prompt for conversations that have none, instead of the template's own."""
    ignore_pad_token_for_loss: bool = True
    """Keep padding out of the loss. False gives padding tokens the pad token as their label."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that a stage cannot train on, such as one without an answer.

    `refuse` stops with an error that names it; `skip` leaves it out, counts it and names the first.
    """
    overwrite_cache: bool = False
    """Accepted so that LLaMA-Factory's files load, and ignored: nothing is cached between runs."""

    @model_validator(mode="after")
    def _check_together(self) -> DataConfig:
        if self.val_size >= 1 and self.val_size != int(self.val_size):
            raise ValueError(
                f"val_size is {self.val_size}; expected a fraction below 1 or a whole number of "
                "examples"
            )
        if self.val_size and self.eval_dataset:
            raise ValueError("val_size and eval_dataset are both set; keep one of them")
        if self.val_size and not self.dataset:
            raise ValueError(
                f"val_size is {self.val_size} but dataset is not set; set dataset, or remove "
                "val_size"
            )
        if self.mask_history and self.train_on_prompt:
            raise ValueError("mask_history and train_on_prompt are both set; keep one of them")
        return self
