"""The keys of `ulysses generate`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ulysses_core.config import ModelConfig
from ulysses_core.config.load import read_values
from ulysses_core.data import DataConfig
from ulysses_core.data.config import Names
from ulysses_core.rewards import check_rewards
from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.validation import describe_problem

__all__ = ["GenerateConfig", "load_generate_config"]


class GenerateConfig(BaseModel):
    """Which prompts to answer with which model, and which answers to keep."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    model_name_or_path: str
    """Folder (or hub name) with the model's weights and tokenizer."""
    adapter_name_or_path: Names = Field(default_factory=list)
    """Folders with adapters, which are merged into the model one after another."""
    tokenizer_name_or_path: str | None = None
    """Folder (or hub name) with the tokenizer. Default: the model's own."""
    trust_remote_code: bool = False
    """Run code that comes with a model from the hub."""
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2"] = "auto"
    """Attention, as in a training."""
    infer_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type of the weights. `auto` takes the one that they are saved in."""

    dataset: Names
    """Names in `dataset_info.json`; the last answer of a row, if it has one, is the reference."""
    dataset_dir: Path = Path("data")
    """Folder with `dataset_info.json` and the files that it names."""
    template: str | None = None
    """Name of the chat template. None uses the tokenizer's own, or `default` if it has none."""
    default_system: str | None = None
    """System prompt for conversations that have none, instead of the template's own."""
    cutoff_len: int = Field(default=2048, gt=0)
    """The longest prompt, in tokens."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first `max_samples` rows of each dataset."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with a row without a prompt, or with one that is too long."""

    num_answers: int = Field(default=1, gt=0)
    """Answers to a prompt."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Divides the logits; 0 always takes the most probable token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most probable tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most probable tokens; 0 for all."""
    max_new_tokens: int = Field(default=1024, gt=0)
    """The longest answer, in tokens."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Together with `per_device_eval_batch_size`, decides the answers."""
    per_device_eval_batch_size: int = Field(default=8, gt=0)
    """Prompts that a process answers at a time, with `num_answers` rows each."""

    reward_funcs: list[Any] = Field(default_factory=list)
    """Rewards, as in stage `grpo`. An answer's reward is their weighted sum."""
    right_at: float = Field(default=1.0, allow_inf_nan=False)
    """An answer is right if the first of `reward_funcs` gives it at least this."""
    keep: str = "all"
    """`all` answers, the `best` of each prompt, or those with a reward `above THRESHOLD`."""
    distinct: bool = False
    """Keep equal answers to a prompt once."""

    output_dir: Path
    """Folder for the datasets, their `dataset_info.json` and `summary.json`."""
    output_name: str = Field(default="answers", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the dataset. With rewards, `<name>_pairs` has the best and worst of each prompt."""
    overwrite_output_dir: bool = False
    """Replace the datasets in `output_dir`."""

    @field_validator("reward_funcs")
    @classmethod
    def _check_rewards(cls, specs: list[Any]) -> list[Any]:
        if specs:
            check_rewards(specs)
        return specs

    @model_validator(mode="after")
    def _check_together(self) -> GenerateConfig:
        if not self.dataset:
            raise ValueError("dataset is not set; set it to a name in dataset_info.json")
        if self.keep not in ("all", "best") and self.threshold is None:
            raise ValueError(
                f"keep is {self.keep!r}; allowed: all, best, above THRESHOLD (such as above 0.5)"
            )
        if self.keep != "all" and not self.reward_funcs:
            raise ValueError(f"keep is {self.keep!r}, but reward_funcs is not set; set it")
        if self.temperature == 0 and self.num_answers > 1:
            raise ValueError(
                f"temperature is 0, so all {self.num_answers} answers to a prompt would be equal; "
                "raise it, or set num_answers to 1"
            )
        return self

    @property
    def threshold(self) -> float | None:
        """The number behind ``above``; None if `keep` is something else."""
        word, _, number = self.keep.partition(" ")
        try:
            threshold = float(number)
        except ValueError:
            return None
        return threshold if word == "above" and math.isfinite(threshold) else None

    @property
    def model(self) -> ModelConfig:
        """The keys of the model, as a training has them."""
        return ModelConfig(
            model_name_or_path=self.model_name_or_path,
            tokenizer_name_or_path=self.tokenizer_name_or_path,
            flash_attn=self.flash_attn,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def data(self) -> DataConfig:
        """The keys of the data, as a training has them."""
        names = set(DataConfig.model_fields) & set(type(self).model_fields)
        return DataConfig(**{name: getattr(self, name) for name in names})


def load_generate_config(path: Path, overrides: Iterable[str] = ()) -> GenerateConfig:
    """Reads and validates a config of `ulysses generate`.

    Args:
        path: a YAML file.
        overrides: ``key=value``, as for a training.

    Raises:
        InputError: the file, a key or a value is wrong.
    """
    values = read_values(path, overrides)
    for key in values:
        if key not in GenerateConfig.model_fields:
            hint = nearest(key, GenerateConfig.model_fields)
            hint = hint or "; docs/training.md lists the keys of generate"
            raise InputError(f"{path}: unknown key {key!r}{hint}")
    try:
        return GenerateConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {describe_problem(error, GenerateConfig)}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
