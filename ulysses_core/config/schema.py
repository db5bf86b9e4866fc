"""The project's own settings; all other keys of a config go to `transformers.TrainingArguments`.

Settings that LLaMA-Factory has too keep its names and defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ulysses_core.data import DataConfig
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
    """The model to train and its tokenizer."""

    model_name_or_path: str | None = None
    """Folder (or hub name) with the model's weights and tokenizer."""
    architecture: dict[str, Any] | None = Field(default=None, alias="model_config")
    """`model_type` and other entries of a transformers config: train from random weights."""
    tokenizer_name_or_path: str | None = None
    """Folder (or hub name) with the tokenizer. Default: the model's own."""
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2"] = "auto"
    """Attention: `auto` is torch's SDPA, `disabled` is eager, `fa2` needs flash-attn."""
    trust_remote_code: bool = False
    """Run code that comes with a model from the hub."""

    @model_validator(mode="after")
    def _check_together(self) -> ModelConfig:
        if (self.model_name_or_path is None) == (self.architecture is None):
            given = "neither is" if self.architecture is None else "both are"
            raise ValueError(
                f"model_name_or_path, model_config: {given} set; set exactly one of them"
            )
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("model_config has no model_type; add one, such as model_type: llama")
        if self.architecture is not None and self.tokenizer_name_or_path is None:
            raise ValueError("model_config comes without a tokenizer; set tokenizer_name_or_path")
        return self


class FinetuningConfig(_Section):
    """What to train, and how."""

    stage: str = "sft"
    """The kind of training: a module of `ulysses_core.trainers.stages`."""
    finetuning_type: Literal["lora", "full"] = "lora"
    """Train LoRA adapters, or all parameters."""
    lora_rank: int = Field(default=8, gt=0)
    """Rank r of the adapters."""
    lora_alpha: int | None = Field(default=None, gt=0)
    """Adapters are scaled by alpha / r. Default: 2 x rank."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout before A."""
    lora_target: str = "all"
    """Comma-separated module names, or `all` for every linear layer except the output layer."""
    additional_target: str | None = None
    """Comma-separated modules to train in full and to save with the adapter."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""
    pissa_init: bool = False
    """Start from the principal singular vectors (arXiv 2404.02948)."""


class MonitorConfig(MonitorSettings):
    """The settings of the monitor, and whether there is one."""

    enabled: bool = True
    """False trains without the monitor."""


class RunSettings(_Section):
    """How to launch the run and where to keep it."""

    output_dir: Path | None = None
    """The run directory, with checkpoints and the model. Default: runs/<config>-<time>."""
    overwrite_output_dir: bool = False
    """Replace the run in `output_dir`."""
    sequence_parallel_size: int = Field(default=1, gt=0)
    """Processes that share a row. It must divide the number of processes."""
    check_family: bool = True
    """Refuse models that sequence parallelism was not shown to train rightly."""
    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed settings: a shipped name, the path of a JSON file, or a mapping."""
    loss_chunk: int | None = Field(default=None, gt=0)
    """Compute logits for this many tokens at a time. Default: for the whole row."""
    mlp_chunk: int | None = Field(default=None, gt=0)
    """Run MLPs on this many tokens at a time and recompute them in the backward pass.

    Default: on the whole row, without recomputing.
    """
    offload_checkpoints: bool = False
    """Keep gradient checkpoints in host memory. Needs gradient_checkpointing."""
    monitor: MonitorConfig = MonitorConfig()
    """The monitor's settings; true or false switches it on or off."""
    adjust_lr: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Multiply the base learning rate by this."""
    preprocessing_num_workers: int | None = None
    """Accepted so that LLaMA-Factory's files load, and ignored: the tokenizer is multithreaded."""
    plot_loss: bool = True
    """Accepted so that LLaMA-Factory's files load, and ignored: the report always has the plot."""

    @model_validator(mode="before")
    @classmethod
    def _read_monitor_switch(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("monitor"), bool):
            return {**values, "monitor": {"enabled": values["monitor"]}}
        return values


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete, validated config.

    Attributes:
        name: the config file's stem.
        settings: how to launch the run and where to keep it.
        model: the model and its tokenizer.
        finetuning: what to train, and how.
        data: the datasets.
        stage_keys: the keys of the stage.
        deepspeed: DeepSpeed's settings without a sequence-parallel size; None without DeepSpeed.
        training: keyword arguments for `transformers.TrainingArguments`.
        raw: the file's keys with the overrides applied, before validation; run.json keeps them.
    """

    name: str
    settings: RunSettings
    model: ModelConfig
    finetuning: FinetuningConfig
    data: DataConfig
    stage_keys: BaseModel
    deepspeed: dict[str, Any] | None
    training: dict[str, Any]
    raw: dict[str, Any]
