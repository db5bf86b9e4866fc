"""Patches methods and undoes it; nothing else in the project patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

__all__ = ["Undo", "patch_method", "undo_all"]

Undo = Callable[[], object]
"""Removes a patch or a hook and leaves the object as it was before."""


def patch_method(instance: Any, name: str, wrapper: Callable[..., Any]) -> Undo:
    """Replaces ``instance.name`` with ``wrapper(original, *args, **kwargs)``, not in its class.

    Args:
        instance: an object; or a class or module, for code that makes the objects out of reach.
        name: the method's name.
        wrapper: takes the original and the call's arguments.

    Returns:
        A function that restores the method. If someone has patched it again since, their patch
        stays, and this one only passes calls through.
    """
    # An engine's or module's own `__setattr__` must not see it; classes and modules need theirs.
    plain = type(instance) if isinstance(instance, type | ModuleType) else object
    had_own = name in vars(instance)
    original = getattr(instance, name)
    is_active = True

    @wraps(original)  # signature inspection must see that of the original
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs) if is_active else original(*args, **kwargs)

    plain.__setattr__(instance, name, patched)

    def undo() -> None:
        nonlocal is_active
        is_active = False
        if vars(instance).get(name) is not patched:
            return
        if had_own:
            plain.__setattr__(instance, name, original)
        else:
            plain.__delattr__(instance, name)

    return undo


def undo_all(undos: list[Undo]) -> None:
    """Runs and removes every undo, the latest first."""
    while undos:
        undos.pop()()
