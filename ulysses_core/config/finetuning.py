"""What to train and how: LoRA, OFT, freeze and full fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ulysses_core.data.config import Names
from ulysses_core.lora.inits import changes_base, check_init_name, needs_rows
from ulysses_monitor.common.errors import InputError

__all__ = ["FinetuningConfig"]


class FinetuningConfig(BaseModel):
    """What to train, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stage: str = "sft"
    """The kind of training: a module of `ulysses_core.trainers.stages`."""
    finetuning_type: Literal["lora", "oft", "freeze", "full"] = "lora"
    """Train LoRA or OFT adapters, some layers, or all parameters."""
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
    lora_init: str = "default"
    """How A and B start: see `ulysses_core.lora.inits`."""
    lora_init_correct_base: bool = True
    """With `orthogonal_small`: take B A from the base, so that training starts at its output."""
    lora_init_rows: int = Field(default=256, gt=0)
    """`eva`, `corda`, `lora_ga`: look at this many rows to train on, the first ones."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""
    pissa_init: bool = False
    """`lora_init: pissa`, or `pissa_niter_<pissa_iter>`."""
    pissa_iter: int = Field(default=16, ge=-1)
    """Subspace iterations of PiSSA's fast SVD; -1 computes the exact one."""
    pissa_convert: bool = False
    """Save an adapter for the original base. It always happens: see docs/training.md."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """LoRA+ (arXiv 2402.12354): the learning rate of B over that of A."""
    loraplus_lr_embedding: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """LoRA+: the learning rate of the adapters of embeddings."""
    create_new_adapter: bool = False
    """Merge all of `adapter_name_or_path`, and train a new adapter."""
    oft_rank: int = Field(default=0, ge=0)
    """Number of OFT's blocks (arXiv 2306.07280); give this or `oft_block_size`, the other as 0."""
    oft_block_size: int = Field(default=32, ge=0)
    """Size of OFT's blocks."""
    oft_target: str = "all"
    """As `lora_target`."""
    module_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which an OFT block is left out of a step."""
    freeze_trainable_layers: int = 2
    """`freeze`: train the last n layers, or the first n if negative."""
    freeze_trainable_modules: Names = Field(default_factory=lambda: ["all"])
    """`freeze`: the modules of those layers that are trained."""
    freeze_extra_modules: Names = Field(default_factory=list)
    """`freeze`: modules outside the layers that are trained too, such as `embed_tokens`."""
    use_llama_pro: bool = False
    """Train only the `freeze_trainable_layers` blocks that LLaMA Pro added (arXiv 2401.02415)."""
    use_dft_loss: bool = False
    """Weigh the loss of each token by its probability (arXiv 2508.05629). Stages `pt` and `sft`."""
    early_stopping_steps: int | None = Field(default=None, gt=0)
    """Stop after this many evaluations without a better `metric_for_best_model`."""

    @field_validator("lora_init")
    @classmethod
    def _check_init(cls, name: str) -> str:
        check_init_name(name)
        return name

    @property
    def has_adapters(self) -> bool:
        """Whether the base is frozen below adapters, and thus the reference model."""
        return self.finetuning_type in ("lora", "oft")

    @property
    def init(self) -> str:
        """The name of the initialisation, of `lora_init` or PiSSA's own keys."""
        if not self.pissa_init:
            return self.lora_init
        return "pissa" if self.pissa_iter == -1 else f"pissa_niter_{self.pissa_iter}"

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation takes B A from the base."""
        return changes_base(self.init) and self.lora_init_correct_base

    @model_validator(mode="after")
    def _check_together(self) -> FinetuningConfig:
        for problem in (self._method_problem(), self._init_problem(), self._value_problem()):
            if problem:
                raise InputError(problem)
        return self

    def _method_problem(self) -> str | None:
        """Names a key of LoRA in another kind of fine-tuning."""
        lora_only = {
            "lora_init": self.lora_init != "default",
            "lora_init_rows": "lora_init_rows" in self.model_fields_set,
            "pissa_init": self.pissa_init,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "loraplus_lr_ratio": self.loraplus_lr_ratio is not None,
        }
        used = [key for key, is_used in lora_only.items() if is_used]
        if used and self.finetuning_type != "lora":
            return (
                f"{used[0]} is for finetuning_type lora; finetuning_type is "
                f"{self.finetuning_type}, so remove it"
            )
        if self.create_new_adapter and not self.has_adapters:
            return (
                "create_new_adapter is for finetuning_type lora and oft; finetuning_type is "
                f"{self.finetuning_type}, so remove it"
            )
        if self.use_llama_pro and self.finetuning_type not in ("freeze", "lora"):
            return (
                "use_llama_pro is for finetuning_type freeze and lora; finetuning_type is "
                f"{self.finetuning_type}, so remove it"
            )
        return None

    def _init_problem(self) -> str | None:
        if self.pissa_init and self.lora_init != "default":
            return f"pissa_init and lora_init: {self.lora_init} are both set; keep one of them"
        if not self.lora_init_correct_base and self.init != "orthogonal_small":
            return (
                f"lora_init_correct_base is false, which only lora_init orthogonal_small takes; "
                f"lora_init is {self.init}, so remove it"
            )
        if "lora_init_rows" in self.model_fields_set and not needs_rows(self.init):
            return (
                f"lora_init_rows is set, which lora_init eva, corda and lora_ga take; lora_init is "
                f"{self.init}, so remove it"
            )
        if self.init == "lora_ga" and self.stage not in ("pt", "sft"):
            return (
                f"lora_init is lora_ga, which takes the gradients of stages pt and sft; stage is "
                f"{self.stage}, so use eva or corda"
            )
        if self.init == "orthogonal" and self.lora_rank % 2:
            return (
                f"lora_rank is {self.lora_rank}; expected an even number with lora_init orthogonal"
            )
        if self.init == "mica" and self.use_dora:
            return "use_dora and lora_init: mica are both set; keep one of them"
        return None

    def _value_problem(self) -> str | None:
        if self.freeze_trainable_layers == 0:
            return (
                "freeze_trainable_layers is 0; expected a number of layers, below 0 for the first "
                "ones"
            )
        if self.use_llama_pro and self.freeze_trainable_layers < 0:
            return (
                f"freeze_trainable_layers is {self.freeze_trainable_layers}; expected the number "
                "of inserted blocks with use_llama_pro"
            )
        if self.finetuning_type == "oft" and (self.oft_rank == 0) == (self.oft_block_size == 0):
            return (
                f"oft_rank is {self.oft_rank} and oft_block_size is {self.oft_block_size}; "
                "expected one of them to be 0"
            )
        if self.use_dft_loss and self.stage not in ("pt", "sft"):
            return f"use_dft_loss is for stages pt and sft; stage is {self.stage}, so remove it"
        return None
