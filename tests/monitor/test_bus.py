from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest

from ulysses_monitor.bus import MAX_FAILURES, Bus
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.sinks import MemorySink


class ListSink:
    """Keeps what it is given; a live sink unless told otherwise."""

    def __init__(self, name: str = "list", lossless: bool = False) -> None:
        self.name, self.lossless = name, lossless
        self.items: list[Any] = []
        self.flushes = self.closes = 0

    def write(self, item: Any) -> None:
        self.items.append(item)

    def flush(self) -> None:
        self.flushes += 1

    def close(self) -> None:
        self.closes += 1


class GatedSink(ListSink):
    """Stands still within `write` until its gate opens."""

    def __init__(self, lossless: bool = False) -> None:
        super().__init__("gated", lossless)
        self.gate, self.entered = threading.Event(), threading.Event()

    def write(self, item: Any) -> None:
        self.entered.set()
        self.gate.wait(30)
        super().write(item)


class FailingSink(ListSink):
    """Fails in the named methods; counts the calls."""

    def __init__(self, *methods: str, healthy: frozenset[int] = frozenset()) -> None:
        super().__init__("failing")
        self.methods, self.healthy, self.calls = methods, healthy, 0

    def write(self, item: Any) -> None:
        self.calls += 1
        if "write" in self.methods and self.calls not in self.healthy:
            raise OSError("disk full")
        super().write(item)

    def flush(self) -> None:
        super().flush()
        if "flush" in self.methods:
            raise OSError("disk full")


def record(step: int) -> StepRecord:
    return StepRecord.of(step, float(step), {"a/a/a": 1.0})


def steps(sink: Any) -> list[int]:
    return [item.step for item in sink.items]


def publish_one_by_one(bus: Bus, sink: FailingSink, count: int) -> None:
    """Each item is a delivery of its own."""
    for step in range(count):
        bus.publish(record(step))
        deadline = time.monotonic() + 1
        while bus._workers[0]._queue and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)


def test_every_sink_gets_every_item_in_order_and_is_closed_once() -> None:
    one, other = ListSink("one"), ListSink("other")
    bus = Bus([one, other])
    for step in range(50):
        bus.publish(record(step))
    bus.publish(Event(kind="stop", step=49, time=0.0))
    bus.close()
    assert steps(one) == steps(other) == [*range(50), 49]
    assert (one.closes, other.closes) == (1, 1)
    assert one.flushes > 0
    assert bus.dropped() == {"one": 0, "other": 0}


def test_a_sink_that_stands_still_does_not_block_the_publisher() -> None:
    slow, fast = GatedSink(), ListSink("fast")
    bus = Bus([slow, fast])
    began = time.perf_counter()
    for step in range(500):
        bus.publish(record(step))
    assert time.perf_counter() - began < 1.0
    slow.gate.set()
    bus.close()
    assert steps(fast) == steps(slow) == list(range(500))


def test_a_slow_live_sink_loses_its_oldest_items_and_they_are_counted() -> None:
    sink = GatedSink()
    bus = Bus([sink], queue_size=10)
    bus.publish(record(0))
    assert sink.entered.wait(5)  # item 0 is in the sink's hands, the queue is empty
    for step in range(1, 31):
        bus.publish(record(step))
    assert bus.dropped() == {"gated": 20}
    sink.gate.set()
    bus.close()
    assert steps(sink) == [0, *range(21, 31)]


def test_a_slow_lossless_sink_loses_nothing() -> None:
    sink = GatedSink(lossless=True)
    bus = Bus([sink], queue_size=10)
    for step in range(200):
        bus.publish(record(step))
    sink.gate.set()
    bus.close()
    assert steps(sink) == list(range(200))
    assert bus.dropped() == {"gated": 0}


def test_a_failing_sink_is_switched_off_and_the_others_do_not_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad, good = FailingSink("write"), ListSink("good")
    bus = Bus([bad, good])
    with caplog.at_level(logging.WARNING):
        for step in range(30):
            bus.publish(record(step))
        bus.close()
    assert bad.calls == MAX_FAILURES
    assert steps(good) == list(range(30))
    assert bus.dropped() == {"failing": 30, "good": 0}
    assert bad.closes == 1
    assert len(caplog.records) == 2  # the first failure, and that it is off


def test_a_sink_that_fails_now_and_then_stays_on() -> None:
    sink = FailingSink("write", healthy=frozenset(range(MAX_FAILURES, 100, MAX_FAILURES)))
    bus = Bus([sink])
    for step in range(30):
        bus.publish(record(step))
    bus.close()
    assert sink.calls == 30


def test_a_sink_that_can_write_but_not_flush_is_switched_off_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = FailingSink("flush")
    bus = Bus([sink])
    with caplog.at_level(logging.WARNING):
        publish_one_by_one(bus, sink, 4 * MAX_FAILURES)
        bus.close()
    assert sink.flushes == MAX_FAILURES
    assert len(caplog.records) == 2


def test_closing_ends_in_time_although_a_sink_hangs(caplog: pytest.LogCaptureFixture) -> None:
    hanging, good = GatedSink(lossless=True), ListSink("good")
    bus = Bus([hanging, good])
    bus.publish(record(0))
    began = time.perf_counter()
    with caplog.at_level(logging.ERROR):
        bus.close(timeout=0.5)
    assert time.perf_counter() - began < 2.0
    assert steps(good) == [0]
    assert good.closes == 1
    assert "gated did not finish in time" in caplog.text
    hanging.gate.set()


def test_after_closing_publishing_does_nothing() -> None:
    sink = MemorySink()
    bus = Bus([sink])
    bus.close()
    bus.publish(record(0))
    bus.close()
    assert sink.records == []
