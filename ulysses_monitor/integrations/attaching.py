"""`attach`: connects a monitor to a Trainer that the user holds."""

from __future__ import annotations

import weakref
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo
from ulysses_monitor.integrations.callback import MonitorCallback, OpensSessions

__all__ = ["attach"]


def attach(monitor: OpensSessions, trainer: Any) -> Undo:
    """Adds a `MonitorCallback` for `monitor` to `trainer`.

    Returns:
        A function that removes it.

    Raises:
        InputError: `trainer` is not a `transformers.Trainer`.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        others = (
            "in Lightning, use Trainer(callbacks=[um.LightningCallback(monitor)])"
            if type(trainer).__module__.startswith(("lightning.", "pytorch_lightning."))
            else "for a plain loop use watch(model, optimizer)"
        )
        raise InputError(
            f"monitor: attach() got a {type(trainer).__name__}; expected a transformers.Trainer or "
            f"a subclass; {others}"
        )
    callback = MonitorCallback(monitor, trainer)
    trainer.add_callback(callback)
    refs = weakref.ref(trainer), weakref.ref(callback)  # a monitor does not keep a Trainer alive

    def remove() -> None:
        trainer, callback = (reference() for reference in refs)
        if trainer is not None and callback is not None:
            callback.finish("stopped")
            trainer.remove_callback(callback)

    return remove
