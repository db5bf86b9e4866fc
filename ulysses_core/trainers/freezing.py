"""Freeze fine-tuning: trains some modules of some layers, as LLaMA-Factory chooses them."""

from __future__ import annotations

import re
from typing import Any

from ulysses_core.config import FinetuningConfig
from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["count_layers", "freeze_layers", "trained_layers"]


def freeze_layers(model: Any, config: FinetuningConfig) -> None:
    """Leaves only the chosen parameters trainable.

    Raises:
        InputError: a module or the number of layers does not suit the model.
    """
    layers = trained_layers(count_layers(model), config)
    names = [name for name, _ in model.named_parameters()]
    inside = {_module_in_layer(name) for name in names if re.search(r"\.\d+\.", name)}
    outside = {name.split(".")[-2] for name in names if not re.search(r"\.\d+\.", name)}
    modules = [m for m in config.freeze_trainable_modules if m != "all"]
    _check("freeze_trainable_modules", modules, inside)
    _check("freeze_extra_modules", config.freeze_extra_modules, outside)
    wanted = "|".join(map(re.escape, modules)) if modules else r"\w+"
    if "all" in config.freeze_trainable_modules:
        wanted = r"\w+"
    in_layer = re.compile(rf"\.({'|'.join(map(str, layers))})\.({wanted})\.")
    for name, parameter in model.named_parameters():
        extra = set(name.split(".")) & set(config.freeze_extra_modules)
        parameter.requires_grad_(bool(in_layer.search(name) or extra))


def count_layers(model: Any) -> int:
    """Returns the number of hidden layers.

    Raises:
        InputError: the model's config does not give it.
    """
    for name in ("num_hidden_layers", "num_layers", "n_layer"):
        if isinstance(count := getattr(model.config, name, None), int):
            return count
    raise InputError(
        f"finetuning_type: the config of {type(model).__name__} has no number of layers, which "
        "freeze and use_llama_pro need; use full or lora"
    )


def trained_layers(count: int, config: FinetuningConfig) -> list[int]:
    """Returns the numbers of the layers that are trained, of `count`.

    Raises:
        InputError: with `use_llama_pro`, the number does not divide `count`.
    """
    trained = config.freeze_trainable_layers
    if not config.use_llama_pro:
        return list(range(count))[-trained:] if trained > 0 else list(range(count))[:-trained]
    if count % trained:
        raise InputError(
            f"freeze_trainable_layers is {trained}; expected a divisor of {count}, the number of "
            "the model's layers, with use_llama_pro"
        )
    stride = count // trained  # the last of each group of layers is one that was inserted
    return list(range(stride - 1, count, stride))


def _module_in_layer(name: str) -> str:
    return re.split(r"\.\d+\.", name, maxsplit=1)[1].split(".")[0]


def _check(key: str, names: list[str], allowed: set[str]) -> None:
    for name in names:
        if name not in allowed:
            hint = nearest(name, allowed)
            raise InputError(f"{key} is {name!r}{hint}; allowed: {', '.join(sorted(allowed))}")
