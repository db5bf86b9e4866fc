"""The project's own settings; all other keys of a config go to `transformers.TrainingArguments`.

Settings that LLaMA-Factory has too keep its names and defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ulysses_core.config.answers import AnswersConfig
from ulysses_core.config.export import ExportConfig
from ulysses_core.config.finetuning import FinetuningConfig
from ulysses_core.data import DataConfig
from ulysses_core.data.config import Names
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
    train_from_scratch: bool = False
    """Take only the config of `model_name_or_path`, and random weights."""
    adapter_name_or_path: Names = Field(default_factory=list)
    """Folders of adapters: the last is trained further, those before it are merged."""
    adapter_folder: str | None = None
    """Folder with the adapter, inside each of `adapter_name_or_path`."""
    cache_dir: str | None = None
    """Where models of the hub are kept."""
    model_revision: str = "main"
    """Branch, tag or commit of a model of the hub."""
    hf_hub_token: str | None = None
    """Token of the hub; no file of the run has it."""
    quantization_bit: Literal[4, 8] | None = None
    """Load the base in 4 or 8 bits and train adapters on it."""
    quantization_method: Literal["bnb", "bitsandbytes", "hqq", "eetq"] = "bnb"
    """The library that quantises: bitsandbytes."""
    quantization_type: Literal["fp4", "nf4"] = "nf4"
    """Type of numbers of 4 bits."""
    double_quantization: bool = True
    """Quantise the scales of 4-bit numbers too."""
    quantization_device_map: Literal["auto"] | None = None
    """Not for training: each process has the whole base on its own device."""

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
        if self.architecture is not None and (self.train_from_scratch or self.quantization_bit):
            key = "train_from_scratch" if self.train_from_scratch else "quantization_bit"
            raise ValueError(f"{key} needs model_name_or_path; model_config is set, so remove it")
        return self

    @model_validator(mode="after")
    def _check_quantisation(self) -> ModelConfig:
        if self.quantization_bit and self.quantization_method in ("hqq", "eetq"):
            raise ValueError(
                f"quantization_method is {self.quantization_method}, with which PEFT's adapters "
                "were not tried here; allowed: bnb"
            )
        if self.quantization_bit and self.quantization_device_map:
            raise ValueError(
                "quantization_device_map is auto, which spreads one model over devices; remove it, "
                "because each process trains on its own device"
            )
        return self


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
    do_train: bool = True
    """False with `do_eval` only evaluates."""
    do_eval: bool = False
    """Evaluate. A training with held-out data does so anyway, before and after."""
    do_predict: bool = False
    """Only evaluate, unless `do_train` is set; `predict_with_generate` compares the answers."""
    pure_bf16: bool = False
    """The same as `bf16`, which keeps the weights in bf16 here."""
    disable_shuffling: bool = False
    """Train on the rows in their order."""

    @model_validator(mode="before")
    @classmethod
    def _read_prediction(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("do_predict") is True:
            return {"do_train": False, **values, "do_eval": True}
        return values

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
        export: where `ulysses export` saves.
        answers: how to look at the model's answers.
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
    export: ExportConfig
    answers: AnswersConfig
    stage_keys: BaseModel
    deepspeed: dict[str, Any] | None
    training: dict[str, Any]
    raw: dict[str, Any]
