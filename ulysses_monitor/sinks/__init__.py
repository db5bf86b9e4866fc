"""Sinks receive records and events."""

from ulysses_monitor.sinks.base import Sink
from ulysses_monitor.sinks.console import ConsoleSink
from ulysses_monitor.sinks.memory import MemorySink
from ulysses_monitor.sinks.specs import check_sinks, make_sinks
from ulysses_monitor.sinks.tensorboard import TensorBoardSink

__all__ = ["ConsoleSink", "MemorySink", "Sink", "TensorBoardSink", "check_sinks", "make_sinks"]
