"""Watches any PyTorch training: gradients, LoRA adapters, optimizer state, alerts.

Two lines attach it to a Hugging Face or TRL Trainer::

    monitor = ulysses_monitor.Monitor("runs/demo")
    monitor.attach(trainer)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulysses_monitor.common.errors import InputError, UlyssesError
    from ulysses_monitor.integrations.callback import MonitorCallback
    from ulysses_monitor.integrations.lightning import LightningCallback
    from ulysses_monitor.integrations.reporting.registration import register, unregister
    from ulysses_monitor.monitor import Monitor
    from ulysses_monitor.policies import Policy
    from ulysses_monitor.reading import RunReader, RunSet, open_run, open_runs
    from ulysses_monitor.records import Action, Alert, Event, Metric, StepRecord
    from ulysses_monitor.rules import Rule
    from ulysses_monitor.session.settings import MonitorSettings
    from ulysses_monitor.sinks import MemorySink, Sink

# Imported when asked for: reading a run needs no torch, watching one needs no transformers.
_HOMES = {
    "Action": "records",
    "Alert": "records",
    "Event": "records",
    "InputError": "common.errors",
    "LightningCallback": "integrations.lightning",
    "MemorySink": "sinks",
    "Metric": "records",
    "Monitor": "monitor",
    "MonitorCallback": "integrations.callback",
    "MonitorSettings": "session.settings",
    "Policy": "policies",
    "Rule": "rules",
    "RunReader": "reading",
    "RunSet": "reading",
    "Sink": "sinks",
    "StepRecord": "records",
    "UlyssesError": "common.errors",
    "open_run": "reading",
    "open_runs": "reading",
    "register": "integrations.reporting.registration",
    "unregister": "integrations.reporting.registration",
}

__all__ = [
    "Action",
    "Alert",
    "Event",
    "InputError",
    "LightningCallback",
    "MemorySink",
    "Metric",
    "Monitor",
    "MonitorCallback",
    "MonitorSettings",
    "Policy",
    "Rule",
    "RunReader",
    "RunSet",
    "Sink",
    "StepRecord",
    "UlyssesError",
    "open_run",
    "open_runs",
    "register",
    "unregister",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ulysses_monitor.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
