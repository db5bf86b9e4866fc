"""Patches methods and decorated functions, and undoes it; nothing else in the project patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

__all__ = ["Undo", "patch_decorated", "patch_method", "undo_all"]

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


def patch_decorated(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Undo:
    """Puts ``wrapper(original, *args, **kwargs)`` between a function and its decorator.

    Modules that imported the decorated function call the wrapper too; a new name in the function's
    own module would not reach them.

    Returns:
        A function that restores the function; see `patch_method`.

    Raises:
        TypeError: `function` is not made by a decorator of one function.
    """
    cells = [c for c in function.__closure__ or () if callable(c.cell_contents)]
    if len(cells) != 1:
        raise TypeError(f"{function!r} is not a decorated function")
    (cell,) = cells
    original = cell.cell_contents
    is_active = True

    @wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs) if is_active else original(*args, **kwargs)

    def undo() -> None:
        nonlocal is_active
        is_active = False
        if cell.cell_contents is patched:
            cell.cell_contents = original

    cell.cell_contents = patched
    return undo


def undo_all(undos: list[Undo]) -> None:
    """Runs and removes every undo, the latest first."""
    while undos:
        undos.pop()()
