"""The settings of the data pipeline, with LLaMA-Factory's names and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["DataConfig", "Stage"]

Stage = Literal["pt", "sft"]
"""What the rows are for: `pt` reads documents, `sft` reads conversations."""


def _split_names(value: object) -> object:
    if value is None:
        return []
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


Names = Annotated[list[str], BeforeValidator(_split_names)]


class DataConfig(BaseModel):
    """Which datasets are read, and how their rows become tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    template: str | None = None
    """Name of the chat template. None takes the tokenizer's own, or `default` where it has none."""
    dataset: Names = Field(default_factory=list)
    """Names in `dataset_info.json` to train on: a list, or one string with commas."""
    eval_dataset: Names = Field(default_factory=list)
    """Names in `dataset_info.json` to evaluate on."""
    dataset_dir: Path = Path("data")
    """Folder that holds `dataset_info.json` and the files that it names."""
    cutoff_len: int = Field(default=2048, gt=0)
    """Longest row, in tokens."""
    train_on_prompt: bool = False
    """Also learn the prompt's tokens."""
    mask_history: bool = False
    """Learn the last answer of a conversation only."""
    packing: bool | None = None
    """Put several documents in one row. None means true for `pt` and false for `sft`."""
    neat_packing: bool = False
    """Pack, and keep the documents of a row from seeing each other.

    Packed `sft` rows are always kept apart; for `pt` this setting makes the difference.
    """
    val_size: float = Field(default=0.0, ge=0.0)
    """Part of `dataset` set aside for evaluation: a fraction below 1, or a number of examples."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first this many examples of each dataset."""
    default_system: str | None = None
    """System prompt of conversations that have none, in place of the template's own."""
    ignore_pad_token_for_loss: bool = True
    """Keep padding out of the loss. False gives padding the label of the pad token."""
    overwrite_cache: bool = False
    """Accepted for LLaMA-Factory's files. Nothing is cached between runs, so it changes nothing."""

    @model_validator(mode="after")
    def _check_together(self) -> DataConfig:
        if self.val_size >= 1 and self.val_size != int(self.val_size):
            raise ValueError(
                f"val_size={self.val_size} is neither a fraction below 1 nor a whole number of rows"
            )
        if self.val_size and self.eval_dataset:
            raise ValueError("val_size and eval_dataset are both set: keep one of them")
        if self.val_size and not self.dataset:
            raise ValueError("val_size needs a dataset to split: set dataset, or remove val_size")
        if self.mask_history and self.train_on_prompt:
            raise ValueError(
                "mask_history and train_on_prompt contradict each other: keep one of them"
            )
        return self

    def packs(self, stage: Stage) -> bool:
        """Returns whether rows of `stage` hold several documents."""
        if self.neat_packing:
            return True
        return stage == "pt" if self.packing is None else self.packing
