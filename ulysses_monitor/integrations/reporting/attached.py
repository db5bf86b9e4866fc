"""The tracker under `ulysses attach`: its runs lie where the command's other runs do."""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING

from ulysses_monitor.integrations.reporting.names import NAME, name_tracker
from ulysses_monitor.integrations.reporting.tracker import UlyssesTracker

if TYPE_CHECKING:
    from ulysses_monitor.session.places import Place
    from ulysses_monitor.session.settings import MonitorSettings

__all__ = ["AttachedTracker", "install"]


def install(tracking: ModuleType) -> None:
    """Makes ``log_with="ulysses"`` known, unless the script did.

    Args:
        tracking: ``accelerate.tracking``, just imported.
    """
    if NAME not in tracking.LOGGER_TYPE_TO_CLASS:
        name_tracker(tracking, AttachedTracker)


class AttachedTracker(UlyssesTracker):
    """Records to the run directory of the attached command."""

    def _choose(self) -> tuple[Place, MonitorSettings]:
        from ulysses_monitor.integrations.auto import (
            AttachSettings,
            Note,
            choose_place,
            write_note,
        )

        settings = AttachSettings.from_environment(os.environ)
        place = choose_place(settings, f"tracker {self.run_name}", 0)
        write_note(settings.notes, Note("recorded", str(place.run_dir)))
        return place, settings.monitor
