"""Attaching to Hugging Face Trainers; the only part that imports transformers."""

from ulysses_monitor.integrations.callback import MonitorCallback, attach

__all__ = ["MonitorCallback", "attach"]
