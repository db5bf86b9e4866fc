"""Describes a Trainer for run.json: its arguments, its adapters, its data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ulysses_monitor.common.ranks import rank
from ulysses_monitor.session.opening import describe_model

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["describe_trainer", "describe_training"]

logger = logging.getLogger(__name__)


def describe_training(trainer: Trainer) -> dict[str, Any]:
    """Returns what run.json says of a training that begins; rank 0 writes it."""
    return {
        "trainer": type(trainer).__name__,
        "model": describe_model(trainer.model),
        "resumed_at_step": trainer.state.global_step or None,
        **(describe_trainer(trainer) if rank() == 0 else {}),
    }


def describe_trainer(trainer: Trainer) -> dict[str, Any]:
    """Returns what run.json says of a Trainer; what cannot be read is absent.

    The store masks secrets; transformers leaves out its own tokens.
    """
    parts: dict[str, Callable[[Trainer], Any]] = {
        "training_arguments": lambda trainer: trainer.args.to_dict(),
        "peft_config": _describe_adapters,
        "train_dataset": _describe_data,
    }
    found = {}
    for name, describe in parts.items():
        try:
            described = describe(trainer)
        except Exception as error:  # noqa: BLE001 - any class of the user's may be in there
            logger.debug("monitor: run.json has no %s: %s", name, error)
            continue
        if described:
            found[name] = described
    return found


def _describe_adapters(trainer: Trainer) -> dict[str, Any]:
    """Returns the configuration of each of peft's adapters."""
    model: Any = trainer.model
    configs = getattr(getattr(model, "module", model), "peft_config", None) or {}
    return {
        name: {key: _sort_set(value) for key, value in config.to_dict().items()}
        for name, config in configs.items()
    }


def _sort_set(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else value


def _describe_data(trainer: Trainer) -> dict[str, Any]:
    """Returns class, number of rows and fingerprint of the training data, where they are known."""
    data: Any = trainer.train_dataset
    if data is None:
        return {}
    about = {"class": type(data).__name__, "fingerprint": getattr(data, "_fingerprint", None)}
    with suppress(TypeError):  # a stream has no length
        about["rows"] = len(data)
    return {name: value for name, value in about.items() if value is not None}
