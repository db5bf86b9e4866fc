"""The ranges of `transformers.TrainingArguments`, which does not check most of them itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ulysses_monitor.common.errors import InputError

__all__ = ["check_ranges"]


@dataclass(frozen=True, kw_only=True)
class _Range:
    """The values that a number may have, and how a message says so."""

    low: float
    high: float = math.inf
    words: str
    has_low: bool = True
    has_high: bool = True

    def __contains__(self, value: float) -> bool:
        """NaN and Inf are in no range."""
        above = value >= self.low if self.has_low else value > self.low
        below = value <= self.high if self.has_high else value < self.high
        return math.isfinite(value) and above and below


_COUNT = _Range(low=1, words="an integer of 1 or more")
_FROM_ZERO = _Range(low=0, words="a number of 0 or more")
_POSITIVE = _Range(low=0, has_low=False, words="a number above 0")
_BELOW_ONE = _Range(low=0, high=1, has_high=False, words="a number of 0 or more and below 1")

_RANGES: Mapping[str, _Range] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "adam_epsilon",
            "warmup_steps",
            "dataloader_num_workers",
        ),
        _FROM_ZERO,
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), _POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _BELOW_ONE),
    "warmup_ratio": _Range(low=0, high=1, words="a number from 0 to 1"),
}


def check_ranges(values: Mapping[str, Any], where: str) -> None:
    """Checks the numbers of a config's training arguments.

    Args:
        values: the values under the keys of the config, of the declared types.
        where: the config, for the message.

    Raises:
        InputError: a number is out of its range, NaN or infinite.
    """
    for key, allowed in _RANGES.items():
        value = values.get(key)
        if _is_number(value) and value not in allowed:
            raise InputError(f"{where}: {key} is {value}; expected {allowed.words}")
    steps = values.get("max_steps")
    if _is_number(steps) and steps != -1 and steps < 1:
        raise InputError(
            f"{where}: max_steps is {steps}; expected an integer of 1 or more, or -1 to train "
            "num_train_epochs"
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
