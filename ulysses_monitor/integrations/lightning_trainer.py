"""What a Lightning Trainer trains: its engine, its description, the names of what it logs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.patching import patch_method
from ulysses_monitor.engines import Engine, find_engine
from ulysses_monitor.records.trainer_names import name_numbers
from ulysses_monitor.session.opening import Training, describe_model
from ulysses_monitor.session.row_indices import RowIndices

__all__ = ["LoaderIndices", "describe_training", "engine_of", "name_metrics", "shifts_labels"]

logger = logging.getLogger(__name__)

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
_PACKAGES = ("lightning.", "pytorch_lightning.")

_ARGUMENTS = (
    "accumulate_grad_batches",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "max_epochs",
    "max_steps",
    "num_devices",
    "num_nodes",
    "precision",
)
"""Attributes of the Trainer that run.json gets."""

_EVALUATION = ("validation_", "validation/", "valid_", "valid/", "val_", "val/", "eval_", "eval/")


def engine_of(trainer: Any, module: Any) -> Engine:
    """Returns the engine view of what `trainer` trains.

    Raises:
        InputError: the strategy, the optimizer or the number of optimizers is not supported.
    """
    _check_strategy(trainer.strategy)
    optimizers = trainer.optimizers
    if len(optimizers) != 1:
        raise InputError(
            f"monitor: {type(module).__name__} has {len(optimizers)} optimizers; expected 1"
        )
    return find_engine(
        trainer.strategy.model,
        optimizers[0],
        scaler=getattr(trainer.precision_plugin, "scaler", None),
        clip_norm=lambda: _clip_norm(trainer, module),
    )


def _check_strategy(strategy: Any) -> None:
    """Refuses strategies that were not tried; a subclass of the user's counts as its base."""
    kinds = type(strategy).__mro__
    own = next((k for k in kinds if k.__module__.startswith(_PACKAGES)), type(strategy))
    if own.__name__ not in _STRATEGIES:
        raise InputError(
            f"monitor: the Lightning strategy is {type(strategy).__name__}; allowed: "
            f"{', '.join(_STRATEGIES)}"
        )


def _clip_norm(trainer: Any, module: Any) -> float | None:
    """Returns the norm that Lightning clips to; None if the module clips in its own way."""
    kinds = type(module).__mro__
    base = next((k for k in kinds if k.__module__.startswith(_PACKAGES)), None)
    name = "configure_gradient_clipping"
    is_own = getattr(type(module), name) is not getattr(base, name, None)
    if is_own or not module.automatic_optimization or _clips_values(trainer):
        return None
    return trainer.gradient_clip_val or math.inf


def _clips_values(trainer: Any) -> bool:
    kind = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)
    return bool(trainer.gradient_clip_val) and kind == "value"


def describe_training(trainer: Any, module: Any) -> Training:
    """Returns what is known of a fit that begins."""
    arguments = {name: getattr(trainer, name, None) for name in _ARGUMENTS}
    arguments["strategy"] = type(trainer.strategy).__name__
    return Training(
        step=trainer.global_step,
        max_steps=_max_steps(trainer),
        info={
            "trainer": f"{type(trainer).__module__.partition('.')[0]}.{type(trainer).__name__}",
            "model": describe_model(module),
            "resumed_at_step": trainer.global_step or None,
            "training_arguments": arguments,
            **_hyperparameters(module),
        },
        abilities=("save", "stop"),
        scheduler=_describe_schedule(trainer),
        no_rerun="Lightning's Trainer",
    )


def _max_steps(trainer: Any) -> int | None:
    """Returns the optimizer steps of the whole training, None if Lightning does not know."""
    steps = trainer.max_steps
    with suppress(Exception):  # Lightning raises if the accumulation changes between epochs
        steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def _describe_schedule(trainer: Any) -> str:
    kinds = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    return kinds[0] if kinds else "constant"


def _hyperparameters(module: Any) -> dict[str, Any]:
    try:
        held = dict(module.hparams)
    except Exception as error:  # noqa: BLE001 - a property that users override
        logger.debug("monitor: run.json has no hyperparameters: %s", error)
        return {}
    return {"hyperparameters": held} if held else {}


def shifts_labels(module: Any) -> bool:
    """Whether a causal language model of transformers is inside, whose loss shifts the labels."""
    for part in module.modules():
        if (kind := getattr(part, "loss_type", None)) is not None and hasattr(part, "config"):
            is_pair = getattr(part.config, "is_encoder_decoder", False)
            return bool(kind == "ForCausalLM" and not is_pair)
    return False


def name_metrics(metrics: Mapping[str, Any], *, is_evaluation: bool) -> dict[str, float]:
    """Returns what a module logged, by metric name; leaves out what the monitor measures.

    >>> name_metrics({"val_loss": 2.0, "accuracy": 0.5}, is_evaluation=True)
    {'eval/loss/total': 2.0, 'eval/accuracy/total': 0.5}
    >>> name_metrics({"train_loss": 2.0, "train/acc": 0.5, "kl_step": 1.0}, is_evaluation=False)
    {'train/acc/total': 0.5, 'train/kl/total': 1.0}
    """
    prefixes = _EVALUATION if is_evaluation else ("train_", "train/")
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            continue
        name = next((key.removeprefix(p) for p in prefixes if key.startswith(p)), key)
        # Of a value that is logged for steps and epochs, Lightning makes two.
        name = name.removesuffix("_epoch" if is_evaluation else "_step")
        numbers.setdefault(name or key, float(value))
    return name_numbers(numbers, is_evaluation=is_evaluation)


class LoaderIndices:
    """Notes the indices that the loaders of a fit draw.

    Lightning begins to iterate before it says that training starts; in between, it hands each
    loader to its strategy.

    Args:
        trainer: Lightning's Trainer, whose fit starts.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._guard = trainer, Guard()
        self._found: list[RowIndices] = []
        self._undo = patch_method(trainer.strategy, "process_dataloader", self._process)

    def undo(self) -> None:
        """Puts the methods of the strategy and the loaders back."""
        self._undo()
        while self._found:
            self._found.pop().undo()

    def take(self) -> list[int] | None:
        """Returns the indices of the next batch to train on; None if they are not known."""
        loader = self._trainer.train_dataloader
        return next((each.take() for each in self._found if each.loader is loader), None)

    def _process(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loader = original(*args, **kwargs)
        self._guard.call("finding the loader", lambda: self._found.append(RowIndices(loader)), None)
        return loader
