"""`register`: makes ``report_to="ulysses"`` and ``log_with="ulysses"`` known names."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.extras import is_installed
from ulysses_monitor.common.patching import Undo, undo_all
from ulysses_monitor.integrations.reporting.names import name_callback, name_tracker
from ulysses_monitor.integrations.reporting.settings import ReportSettings

__all__ = ["register", "unregister"]

_undos: list[Undo] = []


def register(run_dir: str | Path | None = None, **settings: Any) -> None:
    """Makes ``ulysses`` a name for transformers' ``report_to`` and accelerate's ``log_with``.

    ``TrainingArguments(report_to="ulysses")`` then watches a Trainer as `Monitor.attach` does, and
    ``Accelerator(log_with="ulysses")`` records what a loop logs. Call it before either is made. A
    later call replaces the settings; `unregister` undoes it.

    Args:
        run_dir: the first training's run directory; later ones get ``-2``, ``-3``, ... By default
            it is the environment variable ``ULYSSES_RUN_DIR``, else ``<output_dir>/ulysses`` for a
            Trainer and ``runs/<project_name>`` for a tracker. A training that resumes from a
            checkpoint continues the last run.
        settings: as `um.Monitor` takes them.

    Raises:
        InputError: a setting is wrong, or neither transformers nor accelerate is installed.
    """
    given = ReportSettings.read({"run_dir": run_dir, **settings}, "register")
    packages = [name for name in ("transformers", "accelerate") if is_installed(name)]
    if not packages:
        raise InputError(
            "register: neither transformers nor accelerate is installed; run "
            "pip install 'ulysses-toolkit[trainers]', or use monitor.watch(model, optimizer)"
        )
    unregister()
    if "transformers" in packages:
        _register_callback(given)
    if "accelerate" in packages:
        _register_tracker(given)


def unregister() -> None:
    """Undoes `register`; trainings that go on are recorded to their end."""
    undo_all(_undos)


def _register_callback(given: ReportSettings) -> None:
    from ulysses_monitor.integrations.reporting.report import ReportCallback

    ReportCallback.given = given
    module = importlib.import_module("transformers.integrations.integration_utils")
    _undos.append(name_callback(module, ReportCallback))


def _register_tracker(given: ReportSettings) -> None:
    from ulysses_monitor.integrations.reporting.tracker import UlyssesTracker

    UlyssesTracker.given = given
    _undos.append(name_tracker(importlib.import_module("accelerate.tracking"), UlyssesTracker))
