"""The project's own settings; the rest of a config are `transformers.TrainingArguments`.

Names and defaults are LLaMA-Factory's where it has the setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ulysses_core.data import DataConfig, Stage
from ulysses_monitor.session.settings import MonitorSettings

__all__ = [
    "FinetuningConfig",
    "ModelConfig",
    "MonitorConfig",
    "RunConfig",
    "RunSettings",
]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class ModelConfig(_Section):
    """Which model is trained, and with which tokenizer."""

    model_name_or_path: str | None = None
    """Folder (or hub name) with a model's weights and tokenizer."""
    architecture: dict[str, Any] | None = Field(default=None, alias="model_config")
    """`model_type` and further entries of a transformers config: train from random weights."""
    tokenizer_name_or_path: str | None = None
    """Folder (or hub name) with the tokenizer; the model's own where not given."""
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2"] = "auto"
    """Attention: `auto` is torch's SDPA, `disabled` is eager, `fa2` needs flash-attn."""
    trust_remote_code: bool = False
    """Allow code that comes with a model from the hub."""

    @model_validator(mode="after")
    def _check_together(self) -> ModelConfig:
        if (self.model_name_or_path is None) == (self.architecture is None):
            raise ValueError("set exactly one of model_name_or_path and model_config")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("model_config needs model_type, such as model_type: llama")
        if self.architecture is not None and self.tokenizer_name_or_path is None:
            raise ValueError("model_config has no tokenizer of its own: set tokenizer_name_or_path")
        return self


class FinetuningConfig(_Section):
    """What is trained, and how."""

    stage: Stage = "sft"
    """`pt` continues text, `sft` learns answers."""
    finetuning_type: Literal["lora", "full"] = "lora"
    """Adapters, or all parameters."""
    lora_rank: int = Field(default=8, gt=0)
    """Rank r of the adapters."""
    lora_alpha: int | None = Field(default=None, gt=0)
    """Scale of the adapters, 2 x rank where not given; they are multiplied by alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout before A."""
    lora_target: str = "all"
    """Module names with commas, or `all` for every linear layer but the output's."""
    additional_target: str | None = None
    """Modules, with commas, that are trained whole and saved with the adapter."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""
    pissa_init: bool = False
    """Start from the principal singular vectors (arXiv 2404.02948)."""


class MonitorConfig(MonitorSettings):
    """How the run is watched: `MonitorSettings`, and whether it is watched at all."""

    enabled: bool = True
    """False trains without the monitor."""


class RunSettings(_Section):
    """How the run is launched and where it is kept."""

    output_dir: Path | None = None
    """The run directory, with checkpoints and the model; runs/<config>-<time> if not set."""
    overwrite_output_dir: bool = False
    """Replace the run that `output_dir` holds."""
    sequence_parallel_size: int = Field(default=1, gt=0)
    """Processes that share a row; must divide the number of processes."""
    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed settings: a shipped name, a path to a JSON file, or the settings themselves."""
    loss_chunk: int | None = Field(default=None, gt=0)
    """Tokens whose logits are in memory at a time; all of a row's where not given."""
    mlp_chunk: int | None = Field(default=None, gt=0)
    """Tokens in an MLP at a time, computed again in the backward pass; all where not given."""
    offload_checkpoints: bool = False
    """Keep gradient checkpoints in the host's memory; needs gradient_checkpointing."""
    monitor: MonitorConfig = MonitorConfig()
    """The monitor's settings; true or false switches it."""
    adjust_lr: float = Field(default=1.0, gt=0.0)
    """Factor on the base learning rate."""
    preprocessing_num_workers: int | None = None
    """Accepted for LLaMA-Factory's files; the tokenizer's own threads make it unnecessary."""
    plot_loss: bool = True
    """Accepted for LLaMA-Factory's files; the report always has the plot."""

    @model_validator(mode="before")
    @classmethod
    def _monitor_switch(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("monitor"), bool):
            return {**values, "monitor": {"enabled": values["monitor"]}}
        return values


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole config, checked.

    Attributes:
        name: the config file's stem.
        settings: launching and keeping.
        model: the model.
        finetuning: the method.
        data: the datasets.
        deepspeed: DeepSpeed's settings, read and without a sequence-parallel size; None without.
        training: keyword arguments for `transformers.TrainingArguments`.
        given: the keys as the user gave them, for run.json.
    """

    name: str
    settings: RunSettings
    model: ModelConfig
    finetuning: FinetuningConfig
    data: DataConfig
    deepspeed: dict[str, Any] | None
    training: dict[str, Any]
    given: dict[str, Any]
