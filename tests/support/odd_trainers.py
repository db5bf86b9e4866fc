"""Trainers that do with their callbacks what frameworks do; importing it imports transformers."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

__all__ = [
    "OwnHandler",
    "OwnHandlerClass",
    "SkipsConstructor",
    "TakesOutBefore",
    "TakesOutDuring",
]


class Handler(CallbackHandler):
    def on_train_begin(self, args: Any, state: Any, control: Any) -> Any:
        return self.call_event("on_train_begin", args, state, control)


def give_handler(trainer: Any, handler: type[CallbackHandler]) -> None:
    trainer.callback_handler = handler(
        [DefaultFlowCallback], trainer.model, None, trainer.optimizer, trainer.lr_scheduler
    )


def take_out(trainer: Any) -> None:
    for callback in list(trainer.callback_handler.callbacks):
        if not isinstance(callback, DefaultFlowCallback | _TakesOut):
            trainer.pop_callback(type(callback))


class _TakesOut(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        take_out(self.trainer)


class OwnHandler(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        give_handler(self, CallbackHandler)


class OwnHandlerClass(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        give_handler(self, Handler)


class TakesOutBefore(Trainer):
    def train(self, *args: Any, **kwargs: Any) -> Any:
        take_out(self)
        return super().train(*args, **kwargs)


class TakesOutDuring(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, _TakesOut(self))


class SkipsConstructor(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(vars(Trainer(*args, **kwargs)))
        give_handler(self, CallbackHandler)
