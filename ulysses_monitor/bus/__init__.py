"""The bus carries records and events from the training thread to the sinks."""

from ulysses_monitor.bus.bus import Bus
from ulysses_monitor.bus.health import MAX_FAILURES

__all__ = ["MAX_FAILURES", "Bus"]
