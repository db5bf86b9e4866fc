"""The bus between the training thread and the sinks."""

from ulysses_monitor.bus.bus import Bus
from ulysses_monitor.bus.health import MAX_FAILURES

__all__ = ["MAX_FAILURES", "Bus"]
