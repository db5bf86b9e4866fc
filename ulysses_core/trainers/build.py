"""Builds the tokenizer and the models of a config."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

from ulysses_core.config import ModelConfig, RunConfig
from ulysses_core.lora.calibration_rows import TokenRows
from ulysses_core.trainers.adapters import add_adapters, find_adapters, first_line, merge_adapter
from ulysses_core.trainers.deepspeed import build_alike
from ulysses_core.trainers.quantised import quantise
from ulysses_core.trainers.reference import ReferenceKeys
from ulysses_monitor.common.errors import InputError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ATTENTION",
    "build_architecture",
    "build_base_model",
    "build_model",
    "build_reference",
    "build_tokenizer",
    "hub_options",
    "load_architecture",
    "model_class",
]

Task = Literal["causal", "score", "value"]
"""The head of a model: logits for each token, one number a row, or logits and a number a token."""

ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with the eos token for padding if it has no pad token.

    Raises:
        InputError: the tokenizer cannot be loaded, or has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer_name_or_path or config.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options(config))
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {source}: cannot load it: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"tokenizer {source}: it has neither a pad token nor an eos token; set pad_token "
                "in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def hub_options(config: ModelConfig) -> dict[str, Any]:
    """Returns the arguments with which transformers loads a model or tokenizer."""
    options = {
        "trust_remote_code": config.trust_remote_code,
        "revision": config.model_revision,
        "cache_dir": config.cache_dir,
        "token": config.hf_hub_token,
    }
    return {key: value for key, value in options.items() if value is not None}


def build_model(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    device: torch.device,
    rows: TokenRows = (),
) -> PreTrainedModel:
    """Loads the model, or makes it with random weights and the run's seed, and adds adapters.

    The weights and adapters are the same on one process and under any engine.

    Args:
        config: the run's.
        tokenizer: gives a made model its vocabulary.
        task: the head of the model.
        device: where tensors are that the process group communicates.
        rows: rows to train on, if the initialisation of the adapters looks at them.

    Raises:
        InputError: the model cannot be loaded or made, or a LoRA target matches no module.
    """
    model = _build_seeded(config, config.model, tokenizer, task, device)
    if config.training.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    return add_adapters(model, config, task, rows, device)


def build_reference(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, task: Task, device: torch.device
) -> PreTrainedModel:
    """Makes a frozen model without adapters: `ref_model`, or what training starts from.

    Raises:
        InputError: As `build_model`.
    """
    keys = config.stage_keys
    source, adapters = config.model, config.model.adapter_name_or_path
    if isinstance(keys, ReferenceKeys) and keys.ref_model is not None:
        adapters = keys.ref_model_adapters
        source = config.model.model_copy(
            update={
                "model_name_or_path": keys.ref_model,
                "architecture": None,
                "train_from_scratch": False,
                "quantization_bit": keys.ref_model_quantization_bit,
            }
        )
    model = _build_seeded(config, source, tokenizer, task, device)
    for folder in find_adapters(source.model_copy(update={"adapter_name_or_path": adapters})):
        model = merge_adapter(model, folder)
    return model.requires_grad_(False)


def _build_seeded(
    config: RunConfig,
    source: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    device: torch.device,
) -> Any:
    import torch
    from transformers import set_seed

    set_seed(config.training.get("seed", 42))
    dtype = torch.bfloat16 if config.training.get("bf16") else torch.float32
    return build_base_model(source, tokenizer, dtype, task, device)


def build_base_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: Any,
    task: Task,
    device: torch.device,
) -> Any:
    """Loads a model without adapters, or makes it with torch's random numbers.

    Raises:
        InputError: the model cannot be loaded or made.
    """
    auto = model_class(task)
    options = {"attn_implementation": ATTENTION[config.flash_attn], "dtype": dtype}
    if task == "score":
        options["num_labels"] = 1
    try:
        if config.architecture is not None or config.train_from_scratch:
            architecture = load_architecture(config, tokenizer)
            architecture.num_labels = options.pop("num_labels", architecture.num_labels)
            return build_alike(lambda: auto.from_config(deepcopy(architecture), **options), device)
        options |= hub_options(config) | quantise(config, dtype, device)
        model = auto.from_pretrained(config.model_name_or_path, **options)
        model.config.pad_token_id = tokenizer.pad_token_id  # where a score is read depends on it
        return model
    except (OSError, ValueError, ImportError) as error:
        path = config.model_name_or_path
        problem = f"model {path}: cannot load it" if path else "model_config: cannot build a model"
        raise InputError(f"{problem}: {first_line(error)}") from error


def load_architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns transformers' config of the model.

    Raises:
        InputError: an entry of `model_config` is wrong.
        OSError: the model's config cannot be read.
    """
    from transformers import AutoConfig

    if config.architecture is not None:
        return build_architecture(config.architecture, tokenizer)
    return AutoConfig.from_pretrained(config.model_name_or_path, **hub_options(config))


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
