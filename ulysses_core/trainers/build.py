"""Builds the tokenizer, the model and the training arguments of a config."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

from ulysses_core.config import FinetuningConfig, ModelConfig, RunConfig
from ulysses_core.trainers.deepspeed import build_alike, start_deepspeed
from ulysses_monitor.common.errors import InputError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

__all__ = [
    "ATTENTION",
    "add_adapters",
    "build_architecture",
    "build_model",
    "build_reference",
    "build_tokenizer",
    "build_training_arguments",
    "check_training_arguments",
    "model_class",
]

logger = logging.getLogger(__name__)

Task = Literal["causal", "score", "value"]
"""The head of a model: logits for each token, one number a row, or logits and a number a token."""

_PEFT_TASKS = {"causal": "CAUSAL_LM", "score": "SEQ_CLS", "value": "CAUSAL_LM"}
ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with the eos token for padding if it has no pad token.

    Raises:
        InputError: the tokenizer cannot be loaded, or has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer_name_or_path or config.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {source}: cannot load it: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"tokenizer {source}: it has neither a pad token nor an eos token; set pad_token "
                "in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: Task, device: torch.device
) -> PreTrainedModel:
    """Loads the model, or makes it from ``model_config`` with the run's seed, and adds adapters.

    The weights and adapters are the same on one process and under any engine.

    Args:
        config: the run's.
        tokenizer: gives a made model its vocabulary.
        task: the head of the model.
        device: where tensors are that the process group communicates.

    Raises:
        InputError: the model cannot be loaded or made, or a LoRA target matches no module.
    """
    model = _build_seeded(config, tokenizer, task, device)
    if config.training.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    return add_adapters(model, config.finetuning, task)


def build_reference(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: Task, device: torch.device
) -> PreTrainedModel:
    """Makes a frozen model with the weights that training starts from, without adapters.

    Raises:
        InputError: As `build_model`.
    """
    return _build_seeded(config, tokenizer, task, device).requires_grad_(False)


def _build_seeded(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: Task, device: torch.device
) -> Any:
    import torch
    from transformers import set_seed

    set_seed(config.training.get("seed", 42))
    dtype = torch.bfloat16 if config.training.get("bf16") else torch.float32
    return _build_base_model(config.model, tokenizer, dtype, task, device)


def _build_base_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: Any,
    task: Task,
    device: torch.device,
) -> Any:
    auto = model_class(task)
    options = {"attn_implementation": ATTENTION[config.flash_attn], "dtype": dtype}
    if task == "score":
        options["num_labels"] = 1
    try:
        if config.architecture is not None:
            architecture = build_architecture(config.architecture, tokenizer)
            architecture.num_labels = options.pop("num_labels", architecture.num_labels)
            return build_alike(lambda: auto.from_config(deepcopy(architecture), **options), device)
        model = auto.from_pretrained(
            config.model_name_or_path, trust_remote_code=config.trust_remote_code, **options
        )
        model.config.pad_token_id = tokenizer.pad_token_id  # where a score is read depends on it
        return model
    except (OSError, ValueError, ImportError) as error:
        path = config.model_name_or_path
        problem = f"model {path}: cannot load it" if path else "model_config: cannot build a model"
        raise InputError(f"{problem}: {_first_line(error)}") from error


def model_class(task: Task) -> Any:
    """Returns transformers' class that makes models of a task."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if task == "score" else AutoModelForCausalLM


def build_architecture(entries: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """Makes a transformers config with the tokenizer's vocabulary size and special tokens.

    Args:
        entries: ``model_type`` and other entries, which override the tokenizer's.
        tokenizer: the tokenizer.

    Raises:
        InputError: an entry is unknown, or the vocabulary is too small.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = entries["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise InputError(
            f"model_config: model_type is {kind!r}{hint}; expected a causal language model of "
            "transformers"
        )
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(**{**tokens, **entries})
    defaults = type(config)()
    unknown = [key for key in entries if not hasattr(defaults, key)]
    if unknown:
        hint = nearest(unknown[0], defaults.to_dict())
        raise InputError(f"model_config: unknown key {unknown[0]!r} of {kind}{hint}")
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"model_config: vocab_size is {config.vocab_size}; expected at least "
            f"{len(tokenizer)}, the size of the tokenizer, so remove or raise it"
        )
    return config


def add_adapters(model: Any, config: FinetuningConfig, task: Task) -> Any:
    """Adds a value head for task `value`, and LoRA adapters if `config` has them.

    Raises:
        InputError: a target matches no module.
    """
    extra = _split_names(config.additional_target or "")
    if task == "value":
        from ulysses_core.trainers.ppo.value_head import NAME, add_value_head

        add_value_head(model)
        extra.append(NAME)
    if config.finetuning_type == "full":
        return model
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if config.lora_target == "all" else _split_names(config.lora_target)
    lora = LoraConfig(
        task_type=_PEFT_TASKS[task],
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=extra or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights="pissa" if config.pissa_init else True,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"lora_target is {config.lora_target!r}: {_first_line(error)}") from error


def _split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def build_training_arguments(
    config: RunConfig, kind: Callable[..., Any], stage_values: dict[str, Any]
) -> TrainingArguments:
    """Makes the training arguments from the project's defaults, the stage and the config.

    This starts the process group of a distributed run.

    Args:
        config: the config.
        kind: `transformers.TrainingArguments`, or a subclass.
        stage_values: what the stage sets.

    Raises:
        InputError: transformers rejects a combination of values.
    """
    args = _make_arguments(config, kind, stage_values, config.deepspeed)
    logger.debug("device %s", args.device)  # reading the device starts the process group
    if config.deepspeed is not None:
        start_deepspeed()
    return args


def check_training_arguments(
    config: RunConfig, kind: Callable[..., Any], stage_values: dict[str, Any], groups: int
) -> None:
    """Makes the arguments of one process without DeepSpeed, and forgets them.

    Args:
        config: the config.
        kind: `transformers.TrainingArguments`, or a subclass.
        stage_values: what the stage sets.
        groups: sequence groups of the training; the one process takes the batches of all.

    Raises:
        InputError: transformers rejects a combination of values.
    """
    from accelerate.state import AcceleratorState, PartialState

    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    batches = {size: config.training.get(size, 8) * groups for size in sizes}
    try:
        _make_arguments(config, lambda **values: kind(**values | batches), stage_values, None)
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


def _make_arguments(
    config: RunConfig,
    kind: Callable[..., Any],
    stage_values: dict[str, Any],
    deepspeed: dict[str, Any] | None,
) -> TrainingArguments:
    import torch

    on_cpu = not torch.accelerator.is_available()
    defaults = {
        "report_to": "none",  # the monitor writes TensorBoard files
        "disable_tqdm": True,  # the monitor shows progress
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,  # the collator returns only what the model needs
        "use_cache": False,  # with a cache transformers does not separate packed documents
        "dataloader_pin_memory": not on_cpu,
        "eval_on_start": bool(config.data.eval_dataset or config.data.val_size),
    }
    if on_cpu and "WORLD_SIZE" in os.environ:
        defaults["ddp_backend"] = "gloo"
    values = {**stage_values, **defaults, **config.training}
    values["learning_rate"] = config.training.get("learning_rate", 5e-5) * config.settings.adjust_lr
    values.pop("resume_from_checkpoint", None)
    try:
        return kind(**values | {"deepspeed": deepspeed, "use_cpu": on_cpu})
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training arguments: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
