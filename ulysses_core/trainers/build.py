"""Tokenizer, model and training arguments from a config."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from ulysses_core.config import FinetuningConfig, ModelConfig, RunConfig
from ulysses_core.trainers.deepspeed import start_deepspeed
from ulysses_monitor.common.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

__all__ = [
    "add_adapters",
    "build_architecture",
    "build_model",
    "build_tokenizer",
    "build_training_arguments",
]

logger = logging.getLogger(__name__)

_ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; it must be able to pad.

    Raises:
        InputError: it cannot be loaded, or has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer_name_or_path or config.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {source}: cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer {source}: has neither a pad token nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Loads the model, or makes it from ``model_config`` with the run's seed; adds adapters.

    Raises:
        InputError: it cannot be loaded or made, or a LoRA target names no module.
    """
    import torch
    from transformers import set_seed

    set_seed(config.training.get("seed", 42))
    dtype = torch.bfloat16 if config.training.get("bf16") else torch.float32
    model = _base_model(config.model, tokenizer, dtype)
    if config.training.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    return add_adapters(model, config.finetuning)


def _base_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": _ATTENTION[config.flash_attn], "dtype": dtype}
    try:
        if config.architecture is not None:
            made = build_architecture(config.architecture, tokenizer)
            return AutoModelForCausalLM.from_config(made, **options)
        return AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path, trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError) as error:
        what = config.model_name_or_path or "model_config"
        raise InputError(f"model {what}: cannot be made: {_first_line(error)}") from error


def build_architecture(entries: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """A transformers config whose vocabulary and special tokens are the tokenizer's.

    Raises:
        InputError: an entry is not known, or the vocabulary is too small.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = entries["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise InputError(
            f"model_config: model_type {kind!r} is no causal language model of transformers{hint}"
        )
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = AutoConfig.for_model(**{**tokens, **entries})
    unknown = [key for key in entries if not hasattr(type(made)(), key)]
    if unknown:
        hint = nearest(unknown[0], type(made)().to_dict())
        raise InputError(f"model_config: {kind} has no entry {unknown[0]!r}{hint}")
    if made.vocab_size < len(tokenizer):
        raise InputError(
            f"model_config: vocab_size is {made.vocab_size}, less than the tokenizer's "
            f"{len(tokenizer)}; leave it out or raise it"
        )
    return made


def add_adapters(model: Any, config: FinetuningConfig) -> Any:
    """`model` with LoRA adapters around it, or itself where all of it is trained.

    Raises:
        InputError: a target names no module.
    """
    if config.finetuning_type == "full":
        return model
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if config.lora_target == "all" else _names(config.lora_target)
    extra = _names(config.additional_target) if config.additional_target else None
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=extra,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights="pissa" if config.pissa_init else True,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"lora_target={config.lora_target}: {_first_line(error)}") from error


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def build_training_arguments(config: RunConfig) -> TrainingArguments:
    """Training arguments with the project's defaults, which the config overrides.

    Making them starts the process group of a distributed run.

    Raises:
        InputError: transformers refuses a combination of values.
    """
    import torch
    from transformers import TrainingArguments

    on_cpu = not torch.accelerator.is_available()
    defaults = {
        "report_to": "none",  # the monitor writes TensorBoard
        "disable_tqdm": True,  # and shows progress
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,  # batches hold what the collator makes, no more
        "use_cache": False,  # with a cache transformers does not see that rows are packed
        "dataloader_pin_memory": not on_cpu,
        "eval_on_start": bool(config.data.eval_dataset or config.data.val_size),
    }
    if on_cpu and "WORLD_SIZE" in os.environ:
        defaults["ddp_backend"] = "gloo"
    given = {**defaults, **config.training}
    given["learning_rate"] = given.get("learning_rate", 5e-5) * config.settings.adjust_lr
    given.pop("resume_from_checkpoint", None)
    try:
        args = TrainingArguments(deepspeed=config.deepspeed, use_cpu=on_cpu, **given)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training arguments: {_first_line(error)}") from error
    logger.debug("device %s", args.device)  # asking for it starts the process group
    if config.deepspeed is not None:
        start_deepspeed()
    return args


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
