"""Maps the numbers that a Hugging Face Trainer logs to metric names.

The Trainer logs ``loss``, ``eval_loss``, ``rewards/chosen``; its TensorBoard files carry
``train/loss``, ``eval/loss``, ``train/rewards/chosen``. Both become ``family/stat/scope``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

__all__ = ["assign_names", "evaluation_name", "logged_name", "tag_name"]

_ILLEGAL = re.compile(r"[^A-Za-z0-9_/]")
_OURS = {"grad_norm": "grad/norm/total", "learning_rate": "optim/lr/0"}


def evaluation_name(name: str) -> str:
    """Returns the metric name of an evaluation's number.

    >>> evaluation_name("eval_loss"), evaluation_name("eval_rouge-l")
    ('eval/loss/total', 'eval/rouge_l/total')
    """
    return f"eval/{_ILLEGAL.sub('_', name.removeprefix('eval_'))}/total"


def logged_name(name: str) -> str:
    """Returns the metric name of a number in a Trainer's ``log_history``.

    >>> logged_name("loss"), logged_name("grad_norm"), logged_name("eval_loss")
    ('train/loss/total', 'grad/norm/total', 'eval/loss/total')
    """
    if name.startswith("eval_"):
        return evaluation_name(name)
    return _OURS.get(name, f"train/{_ILLEGAL.sub('_', name)}/total")


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
