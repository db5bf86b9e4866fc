"""An OTLP receiver on this machine decodes what the sink sends, with OpenTelemetry's protobuf."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.sinks.sink_items import (
    HOSTILE,
    NOT_FINITE,
    Receiver,
    alert,
    deliver,
    hostile,
    many,
    on_a_thread,
    record,
)
from tests.support.ports import free_port
from ulysses_monitor.records import StepRecord
from ulysses_monitor.sinks.opentelemetry import OpenTelemetrySink

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "METRICS_ENDPOINT", "HEADERS", "METRICS_HEADERS"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)


def sink_for(receiver: Receiver, **more: Any) -> OpenTelemetrySink:
    sink = OpenTelemetrySink(f"http://127.0.0.1:{receiver.port}", timeout=1.0, **more)
    sink.open(Path("runs/demo"), {})
    return sink


def decoded(receiver: Receiver) -> list[Any]:
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

    kind = metrics_service_pb2.ExportMetricsServiceRequest
    return [kind.FromString(body) for body in receiver.bodies]


def points(receiver: Receiver) -> list[tuple[str, dict[str, str], int, float]]:
    """Returns name, attributes, microseconds and value of each gauge's points, in order."""
    found = []
    for request in decoded(receiver):
        for metric in request.resource_metrics[0].scope_metrics[0].metrics:
            for point in metric.gauge.data_points:
                attributes = {a.key: a.value.string_value for a in point.attributes}
                value = point.as_double if point.HasField("as_double") else point.as_int
                found.append((metric.name, attributes, point.time_unix_nano // 1000, value))
    return found


def test_every_step_arrives_with_its_own_time() -> None:
    with Receiver() as receiver:
        deliver(sink_for(receiver), [record(1), record(2)])
    assert receiver.paths == ["/v1/metrics"]
    found = points(receiver)
    assert ("ulysses.step", {}, 1_700_000_002_250_000, 2) in found
    norms = [(p[1], p[2], p[3]) for p in found if p[0] == "ulysses.grad.norm"]
    assert norms == [
        ({"scope": "layer/0"}, 1_700_000_001_250_000, 0.5),
        ({"scope": "layer/0"}, 1_700_000_002_250_000, 1.0),
    ]
    assert {p[0] for p in found} == {"ulysses.step", "ulysses.grad.norm", "ulysses.train.loss"}


def test_the_run_is_named_and_nothing_from_the_environment_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "secret=swordfish")
    with Receiver() as receiver:
        deliver(sink_for(receiver), [record(1)])
    (request,) = decoded(receiver)
    attributes = {
        a.key: a.value.string_value for a in request.resource_metrics[0].resource.attributes
    }
    assert attributes == {"service.name": "ulysses", "ulysses.run": "demo"}


def test_alerts_are_counted_by_rule_and_severity() -> None:
    with Receiver() as receiver:
        sink = sink_for(receiver)
        deliver_open(sink, [record(1), alert(1)])
        deliver_open(sink, [alert(2), alert(3, rule="other")])
        on_a_thread(sink.close)
    (metric,) = decoded(receiver)[-1].resource_metrics[0].scope_metrics[0].metrics
    counts = {
        tuple(a.value.string_value for a in point.attributes): point.as_int
        for point in metric.sum.data_points
    }
    assert metric.name == "ulysses.alerts"
    assert metric.sum.is_monotonic
    assert counts == {("spike", "critical"): 2, ("other", "critical"): 1}


def deliver_open(sink: OpenTelemetrySink, items: list[Any]) -> None:
    def work() -> None:
        for item in items:
            sink.write(item)
        sink.flush()

    on_a_thread(work)


def test_nan_and_inf_arrive() -> None:
    with Receiver() as receiver:
        deliver(sink_for(receiver), [StepRecord.of(1, 0.0, NOT_FINITE)])
    values = [p[3] for p in points(receiver) if p[0] == "ulysses.grad.norm"]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 0.5]


def test_hostile_names_arrive_as_attributes_and_legal_metric_names() -> None:
    with Receiver() as receiver:
        deliver(sink_for(receiver), [hostile()])
    found = points(receiver)
    assert len(found) == len(HOSTILE) + 1
    assert all(
        name.replace(".", "").replace("_", "").replace("-", "").isalnum() for name, *_ in found
    )
    scopes = {p[1]["scope"] for p in found if p[1]}
    assert "layer/<script>alert(1)</script>" in scopes
    assert "layer/lone\\ud800surrogate" in scopes


def test_thousands_of_metrics_arrive() -> None:
    with Receiver() as receiver:
        deliver(sink_for(receiver), [many(1, 5000)])
    assert len(points(receiver)) == 5001


def test_a_flush_without_new_items_sends_nothing() -> None:
    with Receiver() as receiver:
        sink = sink_for(receiver)
        deliver_open(sink, [record(1)])
        deliver_open(sink, [])
        on_a_thread(sink.close)
        assert len(receiver.bodies) == 1


def test_records_written_without_a_receiver_arrive_later() -> None:
    port = free_port()
    sink = OpenTelemetrySink(f"http://127.0.0.1:{port}", timeout=0.5)
    for step in (1, 2):
        with pytest.raises(ConnectionError, match="did not accept the metrics"):
            deliver_open(sink, [record(step)])
    with Receiver(port) as first:
        deliver_open(sink, [])
    with pytest.raises(ConnectionError):
        deliver_open(sink, [record(3)])
    with Receiver(port) as second:
        deliver_open(sink, [record(4)])
        on_a_thread(sink.close)
    steps = [[p[3] for p in points(r) if p[0] == "ulysses.step"] for r in (first, second)]
    assert steps == [[1, 2], [3, 4]]


def test_waiting_records_are_bounded() -> None:
    with Receiver() as receiver:
        sink = sink_for(receiver)
        deliver(sink, [record(step) for step in range(1, 1001)])
    steps = [p[3] for p in points(receiver) if p[0] == "ulysses.step"]
    assert steps == list(range(745, 1001))


def test_a_refused_export_raises_and_is_sent_again() -> None:
    with Receiver() as receiver:
        receiver.answers = [400, 200]
        sink = sink_for(receiver)
        with pytest.raises(ConnectionError):
            deliver_open(sink, [record(1)])
        deliver_open(sink, [])
        on_a_thread(sink.close)
    assert len(receiver.bodies) == 2


def test_a_closed_sink_starts_over() -> None:
    with Receiver() as receiver:
        sink = sink_for(receiver)
        deliver(sink, [record(1)])
        deliver(sink, [record(2)])
    assert [p[3] for p in points(receiver) if p[0] == "ulysses.step"] == [1, 2]


def test_headers_come_from_the_environment_and_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=swordfish-0123")
    with Receiver() as receiver:
        deliver(sink_for(receiver), [record(1)])
        receiver.answers = [500]
        with pytest.raises(ConnectionError) as failure:
            deliver(sink_for(receiver), [record(1)])
    assert receiver.headers[0]["authorization"] == "swordfish-0123"
    assert "swordfish" not in caplog.text + repr(failure.value)


def test_the_standard_environment_variable_sets_the_receiver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.port}")
        deliver(OpenTelemetrySink(), [record(1)])
    assert receiver.paths == ["/v1/metrics"]


def test_no_global_meter_provider_is_set() -> None:
    from opentelemetry import metrics

    before = metrics.get_meter_provider()
    with Receiver() as receiver:
        deliver(sink_for(receiver), [record(1)])
    assert metrics.get_meter_provider() is before
