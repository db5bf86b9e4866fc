"""How runs are recorded that are asked for by name, ``report_to="ulysses"``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulysses_monitor.common.validation import validate
from ulysses_monitor.session.naming import check_run_dir
from ulysses_monitor.session.settings import MonitorSettings

__all__ = ["RUN_DIR_VARIABLE", "ReportSettings"]

RUN_DIR_VARIABLE = "ULYSSES_RUN_DIR"
"""The environment variable that names the run directory."""


@dataclass(frozen=True)
class ReportSettings:
    """What `register` was given.

    Attributes:
        run_dir: the first training's run directory, if the user named it.
        monitor: how each training is recorded.
    """

    run_dir: Path | None = None
    monitor: MonitorSettings = field(default_factory=MonitorSettings)

    @classmethod
    def read(cls, settings: Mapping[str, Any], where: str) -> ReportSettings:
        """Reads fields of `MonitorSettings`, and ``run_dir``.

        Args:
            settings: what the user gave.
            where: where, for messages.

        Raises:
            InputError: a setting is wrong.
        """
        more = dict(settings)
        run_dir = more.pop("run_dir", None)
        monitor = validate(MonitorSettings, more, where)
        path = None if run_dir is None else check_run_dir(run_dir, "new")
        return cls(path, monitor)

    def first_dir(self, default: Path) -> Path:
        """Returns the first training's run directory.

        Args:
            default: the directory if the user named none.

        Raises:
            InputError: the environment variable names no local directory.
        """
        named = self.run_dir or os.environ.get(RUN_DIR_VARIABLE)
        return check_run_dir(named, "new") if named else default
