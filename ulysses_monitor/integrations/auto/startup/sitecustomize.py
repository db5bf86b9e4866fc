"""Runs at the start of every Python process of an attached command, before anything else does.

`ulysses attach` puts this file's folder on PYTHONPATH, and Python imports a module of this name by
itself. Many such processes never train, or belong to an interpreter that has nothing installed: so
only the standard library is used, and all that happens here is that two imports are waited for. Two
notes tell the command line that the process could be attached, and which frameworks it imported.
"""

from __future__ import annotations

import atexit
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
_PACKAGE = "ulysses_monitor"
_WAITED = {
    "transformers.trainer": f"{_PACKAGE}.integrations.auto.callback",
    "accelerate.tracking": f"{_PACKAGE}.integrations.reporting.attached",
}
"""Modules, and the ones of ours whose `install` takes them once they are imported."""
_FRAMEWORKS = (
    *("llamafactory", "swift", "axolotl", "unsloth", "sentence_transformers", "setfit", "trl"),
    *("lightning", "pytorch_lightning", "torchtitan", "ray", "accelerate", "deepspeed"),
    "transformers",
)
"""What a process may train with, the most specific first."""


class _WaitForTrainer:
    """Finds what is waited for where it is found anyway, and attaches once it is there."""

    def __init__(self) -> None:
        self.missing = set(_WAITED)

    def found(self, name: str) -> None:
        """Waits for `name` no more, and leaves when nothing is left to wait for."""
        self.missing.discard(name)
        if not self.missing:
            sys.meta_path[:] = [other for other in sys.meta_path if other is not self]

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.missing:
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
        if module.__name__ in finder.missing:
            del loader.exec_module
            finder.found(module.__name__)
            _attach(module)

    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]
    except AttributeError as error:
        _warn(error)


def _attach(module: ModuleType) -> None:
    from importlib import import_module

    try:
        _provide_package()
        import_module(_WAITED[module.__name__]).install(module)
    except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
        _warn(error)


def _provide_package() -> None:
    """Makes the package importable that this file is a part of, if this interpreter has none."""
    import importlib.util

    if importlib.util.find_spec(_PACKAGE) is not None:
        return
    # Not by way of sys.path: whatever else lies beside the package belongs to another interpreter.
    package = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))  # noqa: PTH120
    spec = importlib.util.spec_from_file_location(
        _PACKAGE,
        f"{package}/__init__.py",
        submodule_search_locations=[package],
    )
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = module
    spec.loader.exec_module(module)


def _warn(error: Exception) -> None:
    """Says it, and notes it for the command's end; see `integrations.auto.notes`."""
    if os.environ.get("RANK", "0") != "0":
        return
    import json

    reason = " ".join(f"{type(error).__name__}: {error}".split())
    sys.stderr.write(f"ulysses: training continues without the monitor: {reason}\n")
    _note("failed", json.dumps(reason))


def _note_frameworks() -> None:
    found = [name for name in _FRAMEWORKS if name in sys.modules]
    if found:
        _note("imported", f'"{" ".join(found)}"')


def _note(outcome: str, text: str = '""') -> None:
    """Appends a note in one write; `text` is JSON."""
    try:
        notes = os.open(os.environ["ULYSSES_ATTACH_NOTES"], os.O_WRONLY | os.O_APPEND)
    except (OSError, KeyError):
        return  # nobody reads them
    try:
        os.write(notes, f'{{"outcome": "{outcome}", "text": {text}}}\n'.encode())
    except OSError:
        pass  # a full disk
    finally:
        os.close(notes)


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
        _note("started")
        atexit.register(_note_frameworks)
    _run_the_one_behind()
