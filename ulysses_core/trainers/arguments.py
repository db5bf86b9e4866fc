"""Makes the training arguments of a config."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ulysses_core.config import RunConfig
from ulysses_core.trainers.adapters import first_line
from ulysses_core.trainers.deepspeed import start_deepspeed
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["build_training_arguments", "check_training_arguments"]

logger = logging.getLogger(__name__)


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
    }
    if config.data.streaming:
        # Ranks cannot share one batch: the rows that it is cut from have other lengths.
        defaults["accelerator_config"] = {"dispatch_batches": False}
    if on_cpu and "WORLD_SIZE" in os.environ:
        defaults["ddp_backend"] = "gloo"
    values = {**stage_values, **defaults, **config.training}
    values["learning_rate"] = config.training.get("learning_rate", 5e-5) * config.settings.adjust_lr
    values.pop("resume_from_checkpoint", None)
    try:
        return kind(**values | {"deepspeed": deepspeed, "use_cpu": on_cpu})
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training arguments: {first_line(error)}") from error
