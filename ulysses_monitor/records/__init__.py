"""The data that all parts exchange: metrics, schemas, records, events, alerts, actions."""

from ulysses_monitor.records.action import KINDS, Action, Mode
from ulysses_monitor.records.events import EVENT_KINDS, Alert, Event, Severity
from ulysses_monitor.records.step import (
    METRIC_SCHEMA_VERSION,
    Cost,
    Metric,
    Schema,
    StepRecord,
    column,
    schema_of,
)

__all__ = [
    "EVENT_KINDS",
    "KINDS",
    "METRIC_SCHEMA_VERSION",
    "Action",
    "Alert",
    "Cost",
    "Event",
    "Metric",
    "Mode",
    "Schema",
    "Severity",
    "StepRecord",
    "column",
    "schema_of",
]
