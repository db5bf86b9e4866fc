"""Sinks by name, as YAML configs and `Monitor` take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ulysses_monitor.common.registry import Registry
from ulysses_monitor.sinks.base import Sink

__all__ = ["SINKS", "check_sinks", "make_sinks"]

SINKS: Registry[Sink] = Registry(
    word="sink",
    plural="sinks",
    known={
        "console": "ulysses_monitor.sinks.console:ConsoleSink",
        "csv": "ulysses_monitor.sinks.csv_file:CsvSink",
        "jsonl": "ulysses_monitor.sinks.jsonl:JsonlSink",
        "memory": "ulysses_monitor.sinks.memory:MemorySink",
        "mlflow": "ulysses_monitor.sinks.mlflow:MlflowSink",
        "opentelemetry": "ulysses_monitor.sinks.opentelemetry:OpenTelemetrySink",
        "prometheus": "ulysses_monitor.sinks.prometheus:PrometheusSink",
        "tensorboard": "ulysses_monitor.sinks.tensorboard:TensorBoardSink",
        "trackio": "ulysses_monitor.sinks.trackio:TrackioSink",
        "wandb": "ulysses_monitor.sinks.wandb:WandbSink",
        "webhook": "ulysses_monitor.sinks.webhook:WebhookSink",
    },
    protocol=Sink,
    needs="write, flush and close methods",
    takes_files=False,
    hides_values=True,
)
"""The project's own sinks, and what a user's must be."""


def make_sinks(specs: Sequence[Any]) -> list[Sink]:
    """Makes sinks from what a user names them by; none of them opens anything yet.

    Args:
        specs: each a sink; a name such as ``"csv"``; an import path, ``"package.module:Class"``;
            or a mapping of one of these to settings, such as ``{"prometheus": {"port": 9464}}``.

    Raises:
        InputError: a name, a setting or an object is wrong.
    """
    return SINKS.make_all(specs)


def check_sinks(specs: Sequence[Any]) -> None:
    """Checks what `make_sinks` would make, without importing a user's class.

    Raises:
        InputError: a name, a setting or the form of an import path is wrong.
    """
    SINKS.check_all(specs)
