"""Why a training cannot compute a step again; said before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import world_size
from ulysses_monitor.engines import Engine
from ulysses_monitor.rules import Rule

__all__ = ["check_rerun"]

_ENGINES = ("plain", "ddp", "deepspeed-zero0", "deepspeed-zero1", "deepspeed-zero2")
_KNOWN_BEFORE = ("grad/", "train/loss", "param/", "optim/", "lora/")
"""Metrics that are known before the optimizer's step; after it, the weights are others."""


def check_rerun(engine: Engine, rules: Sequence[Rule], obstacle: str) -> None:
    """Checks that the step can be computed again when one of `rules` asks for it.

    Args:
        engine: what is trained.
        rules: those that ask for it.
        obstacle: what the way in knows to be in the way, such as ``torch.compile``; empty if
            nothing is.

    Raises:
        InputError: it cannot.
    """
    if found := obstacle or _find_obstacle(engine):
        raise InputError(
            f"rule {rules[0].name}: on_alert is rerun; expected a training under "
            f"{', '.join(_ENGINES[:2])} or ZeRO-0, 1 or 2, but this one uses {found}"
        )
    for rule in rules:
        late = [n for n in getattr(rule, "needs", ()) if not n.startswith(_KNOWN_BEFORE)]
        if late:
            raise InputError(
                f"rule {rule.name}: on_alert is rerun; expected a rule about the loss, gradients "
                f"or weights, but it reads {late[0]}, which is known only after the step"
            )


def _find_obstacle(engine: Engine) -> str:
    name = engine.name.removesuffix("-offload")
    if name not in _ENGINES:
        return engine.name
    if name == "plain" and world_size() > 1:
        return f"{world_size()} processes without a known engine between them"
    for module in engine.model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            return "SyncBatchNorm, which communicates within the model"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return "torch.compile"
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"):
            return "gradient checkpointing with use_reentrant=True"
    return ""
