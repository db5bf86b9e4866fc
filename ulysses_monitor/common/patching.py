"""The one place where something is patched: a method, on one instance, and put back whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["Undo", "patch_method", "undo_all"]

Undo = Callable[[], None]
"""Takes a patch or a hook back, leaving the object as it was."""


def patch_method(instance: Any, name: str, wrapper: Callable[..., Any]) -> Undo:
    """Replaces ``instance.name`` by ``wrapper(original, *args, **kwargs)``; the class is untouched.

    Returns:
        A function that puts the method back. Where somebody else has patched over it since, their
        patch stays and this one turns into a plain pass-through.
    """
    had_own = name in vars(instance)
    original = getattr(instance, name)
    active = True

    @wraps(original)  # who asks for the signature is to see that of the original
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs) if active else original(*args, **kwargs)

    object.__setattr__(instance, name, patched)

    def undo() -> None:
        nonlocal active
        active = False
        if vars(instance).get(name) is not patched:
            return
        if had_own:
            object.__setattr__(instance, name, original)
        else:
            object.__delattr__(instance, name)

    return undo


def undo_all(undos: list[Undo]) -> None:
    """Runs and forgets every undo, the latest first."""
    while undos:
        undos.pop()()
