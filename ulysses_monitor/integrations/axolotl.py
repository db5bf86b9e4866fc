"""A plugin of axolotl: watches the Trainer that axolotl creates; only axolotl imports this.

In axolotl's YAML::

    plugins:
      - ulysses_monitor.integrations.axolotl.UlyssesPlugin
    ulysses:             # optional: settings as `um.Monitor` takes them, and run_dir
      sample_every: 20

It was written against the source of ``axolotl.integrations.base.BasePlugin`` and not tried with
axolotl itself, which needs Python 3.12.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ulysses_monitor.integrations.reporting.report import ReportCallback
from ulysses_monitor.integrations.reporting.settings import ReportSettings

__all__ = ["UlyssesArgs", "UlyssesPlugin"]


class UlyssesArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    ulysses: dict[str, Any] | None = None
    """Settings of the monitor, and ``run_dir``; by default the run is ``<output_dir>/ulysses``."""


class UlyssesPlugin(BasePlugin):
    """Attaches a monitor to each Trainer."""

    def get_input_args(self) -> str:
        """Returns where axolotl finds the class that describes the plugin's keys."""
        return f"{UlyssesArgs.__module__}.{UlyssesArgs.__qualname__}"

    def register(self, cfg: Any) -> None:
        """Checks the settings before a model is loaded.

        Raises:
            InputError: a setting is wrong.
        """
        _read(cfg)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attaches the monitor.

        Raises:
            InputError: a setting is wrong.
        """
        trainer.add_callback(ReportCallback(_read(cfg)))


def _read(cfg: Any) -> ReportSettings:
    return ReportSettings.read(dict(cfg.get("ulysses") or {}), "axolotl: ulysses")
