"""Maps the numbers that a Hugging Face Trainer logs to metric names.

The Trainer logs ``loss``, ``eval_loss``, ``rewards/chosen``; its TensorBoard files carry
``train/loss``, ``eval/loss``, ``train/rewards/chosen``. Both become ``family/stat/scope``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

__all__ = [
    "MEASURED",
    "assign_names",
    "evaluation_name",
    "logged_name",
    "name_logged",
    "name_numbers",
    "tag_name",
]

logger = logging.getLogger(__name__)

_ILLEGAL = re.compile(r"[^A-Za-z0-9_/]")
_OURS = {"grad_norm": "grad/norm/total", "learning_rate": "optim/lr/0"}
_SPEED = ("tokens_per_second", "step_seconds", "mfu")

MEASURED = frozenset(
    (*_OURS.values(), *(f"train/{stat}/total" for stat in ("loss", "loss_tokens", *_SPEED)))
)
"""Metrics that a Trainer logs too, and the monitor measures itself at every step."""

_PROGRESS = re.compile(
    "epoch|step|num_input_tokens_seen|total_flos|train_loss|train_runtime|.*_per_second"
)
"""Names of a Trainer's numbers on its progress and speed, and on the whole training at its end."""


def evaluation_name(name: str) -> str:
    """Returns the metric name of an evaluation's number.

    >>> evaluation_name("eval_loss"), evaluation_name("eval_rouge-l")
    ('eval/loss/total', 'eval/rouge_l/total')
    """
    return f"eval/{_to_stat(re.sub('^eval[_/]', '', name))}/total"


def logged_name(name: str) -> str:
    """Returns the metric name of a number in a Trainer's ``log_history``.

    >>> logged_name("loss"), logged_name("grad_norm"), logged_name("eval_loss")
    ('train/loss/total', 'grad/norm/total', 'eval/loss/total')
    >>> logged_name("rewards/chosen"), logged_name("train/kl"), logged_name("/a b")
    ('train/rewards/chosen/total', 'train/kl/total', 'train/a_b/total')
    """
    if name.startswith(("eval_", "eval/")):
        return evaluation_name(name)
    return _OURS.get(name) or f"train/{_to_stat(name.removeprefix('train/'))}/total"


def _to_stat(name: str) -> str:
    """Returns `name` as the middle of a metric name, where no part may be empty."""
    return "/".join(filter(None, _ILLEGAL.sub("_", name).split("/"))) or "unnamed"


def name_numbers(logs: Mapping[Any, Any], *, is_evaluation: bool = False) -> dict[str, float]:
    """Returns the numbers that a Trainer logs and the monitor does not measure, by metric name.

    It leaves out the Trainer's progress and speed. Of two numbers that get the same name, the first
    one counts.

    Args:
        logs: what the Trainer logs.
        is_evaluation: whether `logs` are the results of an evaluation.

    >>> name_numbers({"loss": 2.0, "epoch": 0.1, "rewards/margins": 0.5, "eval_loss": 3.0})
    {'train/rewards/margins/total': 0.5, 'eval/loss/total': 3.0}
    >>> name_numbers({"eval_loss": 3.0, "accuracy": 0.5, "epoch": 1.0}, is_evaluation=True)
    {'eval/loss/total': 3.0, 'eval/accuracy/total': 0.5}
    """
    prefixes = ("eval_", "eval/", *_other_prefixes(logs))
    found: dict[str, float] = {}
    for key, value in _numbers(logs):
        is_of_evaluation = key.startswith(prefixes)
        if not is_of_evaluation and _PROGRESS.fullmatch(key):
            continue
        name = evaluation_name(key) if is_of_evaluation or is_evaluation else logged_name(key)
        if name in found:
            logger.debug("monitor: the Trainer's %r is not recorded: %s is taken", key, name)
        elif name not in MEASURED:
            found[name] = value
    return found


def name_logged(values: Mapping[Any, Any], *, is_measured: bool) -> dict[str, float]:
    """Returns the numbers that a loop hands to a tracker, by metric name.

    Args:
        values: what the loop logs; a name that ends in ``/total`` is a metric's already.
        is_measured: whether the monitor measures loss, gradient norm and learning rate itself; what
            the loop logs of these then gets a name beside them.

    >>> name_logged({"loss": 2.0, "epoch": 1, "my/metric/total": 0.5}, is_measured=False)
    {'train/loss/total': 2.0, 'train/epoch/total': 1.0, 'my/metric/total': 0.5}
    >>> name_logged({"loss": 2.0, "grad_norm": 1.0}, is_measured=True)
    {'train/logged_loss/total': 2.0, 'train/logged_grad_norm/total': 1.0}
    """
    found: dict[str, float] = {}
    for key, value in _numbers(values):
        is_name = key.endswith("/total") and key.count("/") > 1
        name = key if is_name else logged_name(key)
        if is_measured and name in MEASURED:
            name = f"train/logged_{_to_stat(key.removeprefix('train/'))}/total"
        found.setdefault(name, value)
    return found


def _other_prefixes(logs: Mapping[Any, Any]) -> list[str]:
    """Finds the prefix that the user gave to an evaluation in place of ``eval``."""
    names = [key for key in logs if isinstance(key, str) and key.endswith("_runtime")]
    ends = [name.removesuffix("_runtime") for name in names]
    return [f"{end}_" for end in ends if end != "train" and f"{end}_samples_per_second" in logs]


def _numbers(logs: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """Yields what is a number, NaN and Inf too, under a name."""
    for key, value in logs.items():
        if isinstance(key, str) and isinstance(value, Real) and not isinstance(value, bool):
            try:
                yield key, float(value)
                continue
            except OverflowError:
                pass
        logger.debug("monitor: the Trainer's %r is not recorded: not a number by name", key)


def tag_name(tag: str) -> str:
    """Returns the metric name of a TensorBoard tag; only the Trainer's own tags are renamed.

    >>> tag_name("train/loss"), tag_name("grad/norm/layer/3"), tag_name("Loss/test")
    ('train/loss/total', 'grad/norm/layer/3', 'Loss/test')
    """
    family, _, name = tag.partition("/")
    if not name or tag.endswith("/total") or "/layer/" in tag:
        return tag
    if family == "train":
        return logged_name(name)
    return evaluation_name(name) if family == "eval" else tag


def assign_names(given: Iterable[str], rule: Callable[[str], str]) -> dict[str, str]:
    """Returns a unique metric name for each given name.

    If `rule` maps two names to the same metric, one of them keeps its own name.

    >>> assign_names(["train/loss", "train/loss/total"], tag_name)
    {'train/loss': 'train/loss', 'train/loss/total': 'train/loss/total'}
    """
    names = {name: rule(name) for name in given}
    # Names that already are metric names come first, then the others in their order.
    taken = {name for name in names if names[name] == name}
    for name, ours in names.items():
        if ours != name:
            names[name] = name if ours in taken else ours
            taken.add(names[name])
    return names
