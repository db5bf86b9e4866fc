"""Puts our classes under the name ``ulysses`` where transformers and accelerate look names up."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all

__all__ = ["NAME", "name_callback", "name_tracker"]

NAME = "ulysses"


def name_callback(integration_utils: ModuleType, callback: type) -> Undo:
    """Makes ``report_to="ulysses"`` add `callback` to a Trainer.

    Args:
        integration_utils: the module of transformers with the closed dictionary of names.
        callback: its class.

    Raises:
        InputError: the module has no such dictionary.
    """
    return _put(integration_utils, "INTEGRATION_TO_CALLBACK", callback)


def name_tracker(tracking: ModuleType, tracker: type) -> Undo:
    """Makes ``log_with="ulysses"`` add `tracker` to an Accelerator.

    Args:
        tracking: ``accelerate.tracking``.
        tracker: a subclass of its ``GeneralTracker``.

    Raises:
        InputError: the module has no dictionary of names.
    """
    undos = [_put(tracking, "LOGGER_TYPE_TO_CLASS", tracker)]
    if not hasattr(tracking, "register_tracker_class"):  # before 1.15, a name must be accelerate's
        users = (tracking, sys.modules.get("accelerate.accelerator"))
        undos += [patch_method(m, "filter_trackers", _filter_trackers) for m in users if m]
    return lambda: undo_all(undos)


def _filter_trackers(
    original: Callable[..., list[Any]], log_with: Any, *args: Any, **kwargs: Any
) -> list[Any]:
    names = list(log_with) if isinstance(log_with, list | tuple) else [log_with]
    if NAME not in names:
        return original(log_with, *args, **kwargs)
    others = [name for name in names if name != NAME]
    return [*original(others, *args, **kwargs), NAME]


def _put(module: ModuleType, dictionary: str, value: type) -> Undo:
    """Puts `value` under our name; undoing it brings back what was there."""
    classes: MutableMapping[str, type] | None = getattr(module, dictionary, None)
    if classes is None:
        raise InputError(
            f"register: {module.__name__} has no {dictionary}; expected transformers 4.57 to 5.24 "
            "and accelerate 1.11 to 1.15"
        )
    before = classes.get(NAME)
    classes[NAME] = value

    def undo() -> None:
        if classes.get(NAME) is not value:
            return
        if before is None:
            del classes[NAME]
        else:
            classes[NAME] = before

    return undo
