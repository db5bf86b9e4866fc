"""Settings of the data pipeline, with LLaMA-Factory's names and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ulysses_core.data.tool_calls import ToolStyle

__all__ = ["DataConfig"]


def _split_names(value: object) -> object:
    if value is None:
        return []
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


Names = Annotated[list[str], BeforeValidator(_split_names)]


def _split_numbers(value: object) -> object:
    return [float(number) for number in value.split(",")] if isinstance(value, str) else value


Probabilities = Annotated[
    list[Annotated[float, Field(ge=0, le=1)]] | None, BeforeValidator(_split_numbers)
]


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
    tool_format: ToolStyle | None = None
    """How tools and calls are written. Default: in the template's own way."""
    enable_thinking: bool | None = True
    """In templates with thoughts: whether answers keep their thoughts, and learn an empty one.

    False removes thoughts; then, and with null, an empty thought belongs to the prompt.
    """
    preserve_thinking: bool = False
    """Keep the thoughts of earlier answers where only the last answer is trained on."""
    ignore_pad_token_for_loss: bool = True
    """Keep padding out of the loss. False gives padding tokens the pad token as their label."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that a stage cannot train on, such as one without an answer.

    `refuse` stops with an error that names it; `skip` leaves it out, counts it and names the first.
    """
    overwrite_cache: bool = False
    """Tokenise again even if the same rows were tokenised before."""
    preprocessing_batch_size: int = Field(default=1000, gt=0)
    """Examples that are tokenised in one call of the tokenizer."""
    tokenized_path: Path | None = None
    """Folder of tokenised rows: the first run writes it, later ones read nothing else."""
    data_shared_file_system: bool = False
    """All nodes share the folder of tokenised rows, so that only one process writes it."""
    streaming: bool = False
    """Read and tokenise rows while training, with few of them in memory; needs `max_steps`."""
    buffer_size: int = Field(default=16384, gt=0)
    """With `streaming`: examples from which the next one is drawn at random."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = (
        "concat"
    )
    """How several datasets become one: one after the other, or drawn in turn.

    `interleave_under` stops when the first dataset is used up, `interleave_over` repeats datasets
    until all are, `interleave_once` draws each row once.
    """
    interleave_probs: Probabilities = None
    """The share of each dataset in an interleaved mix: a list, or a comma-separated string."""
    eval_on_each_dataset: bool = False
    """Evaluate on each dataset of `eval_dataset` by itself."""

    @model_validator(mode="after")
    def _check_together(self) -> DataConfig:
        if self.val_size >= 1 and self.val_size != int(self.val_size):
            raise ValueError(
                f"val_size is {self.val_size}; expected a fraction below 1 or a whole number of "
                "examples"
            )
        if self.val_size and self.eval_dataset:
            raise ValueError("val_size and eval_dataset are both set; keep one of them")
        if self.val_size and not self.dataset and self.tokenized_path is None:
            raise ValueError(
                f"val_size is {self.val_size} but dataset is not set; set dataset, or remove "
                "val_size"
            )
        if self.mask_history and self.train_on_prompt:
            raise ValueError("mask_history and train_on_prompt are both set; keep one of them")
        return self

    @model_validator(mode="after")
    def _check_streaming(self) -> DataConfig:
        if self.streaming and 0 < self.val_size < 1:
            raise ValueError(
                f"val_size is {self.val_size} with streaming; expected a number of examples, "
                "because the length of a stream is unknown"
            )
        if self.streaming and self.max_samples:
            raise ValueError("streaming and max_samples are both set; keep one of them")
        return self

    @model_validator(mode="after")
    def _check_mix(self) -> DataConfig:
        shares = self.interleave_probs
        if shares is None:
            return self
        if self.mix_strategy == "concat":
            raise ValueError(
                "interleave_probs is set, but mix_strategy is concat; expected one that interleaves"
            )
        for key in ("dataset", "eval_dataset"):
            names = getattr(self, key)
            if len(names) > 1 and len(names) != len(shares):
                raise ValueError(
                    f"interleave_probs has {len(shares)} numbers; expected {len(names)}, one for "
                    f"each of {key}"
                )
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the sum of interleave_probs is {sum(shares):g}; expected 1")
        return self
