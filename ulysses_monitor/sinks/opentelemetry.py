"""Sends metrics to an OpenTelemetry collector, over OTLP and HTTP.

The sink uses the exporter without the SDK's meters, which keep only one value per export interval
and only log a failed export. Here every step arrives with its own time, and a failure raises.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ulysses_monitor.common.settings import Text, checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import escape_surrogates
from ulysses_monitor.sinks.arguments import Patterns, plain_url, require_library
from ulysses_monitor.sinks.selection import Selection

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import Metric, MetricsData, NumberDataPoint

__all__ = ["OpenTelemetrySink"]

_KEPT = 256
"""Most records that wait for an unreachable receiver; the oldest are dropped first."""

_LONGEST_NAME = 255


class OpenTelemetrySink:
    """Sends gauges ``ulysses.<family>.<stat>`` with attribute ``scope``, and counts of alerts.

    Headers, and so credentials, come from ``OTEL_EXPORTER_OTLP_HEADERS`` or
    ``OTEL_EXPORTER_OTLP_METRICS_HEADERS``.

    Args:
        endpoint: URL of the receiver, without ``/v1/metrics``; by default, that of the standard
            environment variables, or http://127.0.0.1:4318.
        timeout: longest time to send, in seconds.
        metrics: patterns of the metrics to send; all but modules and parameters by default.

    Raises:
        InputError: an argument is wrong, or the libraries are not installed.
    """

    name = "opentelemetry"

    @checked_arguments("sink opentelemetry")
    def __init__(
        self,
        endpoint: Text | None = None,
        timeout: Annotated[float, Field(ge=0.1, le=600)] = 5.0,
        metrics: Patterns | None = None,
    ) -> None:
        self._endpoint = _metrics_url(endpoint)
        self._selection = Selection(metrics)
        require_library(self.name, "opentelemetry.exporter.otlp.proto.http")
        self._timeout = timeout
        self._run = "run"
        self._records: deque[StepRecord] = deque(maxlen=_KEPT)
        self._alerts: Counter[tuple[str, str]] = Counter()
        self._alerted = 0.0
        self._started: float | None = None
        self._exporter: OTLPMetricExporter | None = None

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Sets the name of the run."""
        self._run = escape_surrogates(str(info.get("name") or run_dir.name))

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`."""
        if self._started is None:
            self._started = item.time
        if isinstance(item, StepRecord):
            self._records.append(item)
        elif item.kind == "alert":
            rule, severity = str(item.data.get("rule")), str(item.data.get("severity"))
            self._alerts[escape_surrogates(rule), escape_surrogates(severity)] += 1
            self._alerted = item.time

    def flush(self) -> None:
        """Sends what waits.

        Raises:
            ConnectionError: the receiver did not accept it; the next `flush` sends it again.
        """
        if not self._records and not self._alerted:
            return
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import MetricExportResult

        if self._exporter is None:
            self._exporter = OTLPMetricExporter(endpoint=self._endpoint, timeout=self._timeout)
        if self._exporter.export(self._data()) is not MetricExportResult.SUCCESS:
            raise ConnectionError(
                "the receiver did not accept the metrics; see the log of the OpenTelemetry exporter"
            )
        self._records.clear()
        self._alerted = 0.0

    def close(self) -> None:
        """Sends what waits and shuts the exporter down; a later `write` starts over."""
        try:
            self.flush()
        finally:
            exporter, self._exporter = self._exporter, None
            self._records.clear()
            self._alerts.clear()
            self._alerted, self._started = 0.0, None
            if exporter is not None:
                exporter.shutdown()

    def _data(self) -> MetricsData:
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        # Not Resource.create, which adds attributes from the environment.
        resource = Resource({"service.name": "ulysses", "ulysses.run": self._run})
        scope = ScopeMetrics(InstrumentationScope("ulysses_monitor"), self._metrics(), "")
        return MetricsData([ResourceMetrics(resource, [scope], "")])

    def _metrics(self) -> list[Metric]:
        from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Metric, Sum

        points: dict[str, list[NumberDataPoint]] = {}
        for record in self._records:
            points.setdefault("ulysses.step", []).append(_point(record.time, record.step))
            for name, value in self._selection.items(record):
                metric, scope = _name_and_scope(name)
                points.setdefault(metric, []).append(_point(record.time, value, scope=scope))
        metrics = [Metric(name, "", "", Gauge(found)) for name, found in points.items()]
        if self._alerted:
            counts = Sum(list(self._counts()), AggregationTemporality.CUMULATIVE, True)
            metrics.append(Metric("ulysses.alerts", "", "", counts))
        return metrics

    def _counts(self) -> Iterable[NumberDataPoint]:
        for (rule, severity), count in self._alerts.items():
            attributes = {"rule": rule, "severity": severity}
            yield _point(self._alerted, count, start=self._started or 0.0, **attributes)


def _point(
    time: float, value: float, start: float | None = None, **attributes: str
) -> NumberDataPoint:
    from opentelemetry.sdk.metrics.export import NumberDataPoint

    began = 0 if start is None else _nanoseconds(start)
    return NumberDataPoint(attributes, began, _nanoseconds(time), value)


def _nanoseconds(seconds: float) -> int:
    """Rounds to microseconds, because a float of nanoseconds since the epoch is off by hundreds."""
    return round(seconds * 1e6) * 1000


def _metrics_url(endpoint: str | None) -> str | None:
    """Returns the URL, or None to let the exporter read the standard environment variables."""
    if endpoint is None:
        names = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        if any(os.environ.get(name) for name in names):
            return None
        endpoint = "http://127.0.0.1:4318"
    plain_url("sink opentelemetry: endpoint", endpoint, "set OTEL_EXPORTER_OTLP_HEADERS")
    return endpoint.rstrip("/") + "/v1/metrics"


def _name_and_scope(name: str) -> tuple[str, str]:
    *family, scope = name.split("/", 2)
    legal = re.sub(r"[^a-zA-Z0-9_.\-]", "_", ".".join(["ulysses", *family]))
    return legal[:_LONGEST_NAME], escape_surrogates(scope)
