"""Runs at the start of every Python process of an attached command, before anything else does.

`ulysses attach` puts this file's folder on PYTHONPATH, and Python imports a module of this name by
itself. Many such processes never train, or belong to an interpreter that has nothing installed: so
only the standard library is used, and all that happens here is that one import is waited for.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

TYPE_CHECKING = False  # typing's own would cost more than the rest of this file
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib is slow to import
_TRAINER = "transformers.trainer"


class _WaitForTrainer:
    """Finds ``transformers.trainer`` where it is found anyway, and attaches once it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TRAINER:
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None and finder is not self else None
            if spec is not None:
                _attach_after_loading(spec.loader, self)
                return spec  # type: ignore[no-any-return]
        return None


def _attach_after_loading(loader: Loader, finder: _WaitForTrainer) -> None:
    """Wraps the loader's method, not the loader: others look at what kind of loader it is.

    Once it is loaded, nothing of this file stays behind.
    """
    load = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        load(module)
        if module.__name__ == _TRAINER:
            del loader.exec_module
            sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]
            _attach(module)

    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]
    except AttributeError as error:
        _warn(error)


def _attach(trainer: ModuleType) -> None:
    try:
        _provide_package()
        from ulysses_monitor.integrations.auto.callback import install

        install(trainer)
    except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
        _warn(error)


def _provide_package() -> None:
    """Makes the package importable that this file is a part of, if this interpreter has none."""
    import importlib.util

    name = "ulysses_monitor"
    if importlib.util.find_spec(name) is not None:
        return
    # Not by way of sys.path: whatever else lies beside the package belongs to another interpreter.
    package = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))  # noqa: PTH120
    spec = importlib.util.spec_from_file_location(
        name,
        f"{package}/__init__.py",
        submodule_search_locations=[package],
    )
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _warn(error: Exception) -> None:
    """Says it, and notes it for the command's end; see `integrations.auto.notes`."""
    if os.environ.get("RANK", "0") != "0":
        return
    import json

    reason = " ".join(f"{type(error).__name__}: {error}".split())
    sys.stderr.write(f"ulysses: training continues without the monitor: {reason}\n")
    try:
        with open(os.environ["ULYSSES_ATTACH_NOTES"], "r+") as notes:  # noqa: PTH123
            notes.seek(0, os.SEEK_END)
            notes.write(json.dumps({"outcome": "failed", "text": reason}) + "\n")
    except (OSError, KeyError):
        pass  # nobody reads them


def _run_the_one_behind() -> None:
    """Runs the `sitecustomize` that Python would have found without this one, in its place."""
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != _HERE]  # noqa: PTH100
    spec = PathFinder.find_spec(__name__, sys.path)
    if spec is None or spec.loader is None:
        return
    from importlib.util import module_from_spec

    module = module_from_spec(spec)
    sys.modules[__name__] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    # A launcher that carries PYTHONPATH to another node may leave the settings behind.
    if "ULYSSES_ATTACH" in os.environ:
        sys.meta_path.insert(0, _WaitForTrainer())
    _run_the_one_behind()
