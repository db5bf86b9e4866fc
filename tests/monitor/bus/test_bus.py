from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ulysses_monitor.bus import MAX_FAILURES, Bus
from ulysses_monitor.bus.queues import LosslessQueue
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.sinks import MemorySink

SIZE = 520
"""Bytes of a record with one metric in a queue."""

WIDE = Schema(tuple(f"a/a/{i}" for i in range(1000)))


class ListSink:
    """Keeps what it gets; a live sink by default."""

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
    """Hangs in `write` until its gate opens."""

    def __init__(self, lossless: bool = False) -> None:
        super().__init__("gated", lossless)
        self.gate, self.entered = threading.Event(), threading.Event()

    def write(self, item: Any) -> None:
        self.entered.set()
        self.gate.wait(30)
        super().write(item)


class FailingSink(ListSink):
    """Raises `error()` in the first `times` calls of one method."""

    def __init__(
        self,
        method: str,
        times: float = float("inf"),
        *,
        error: Callable[[], Exception] = lambda: OSError("disk full"),
        lossless: bool = False,
    ) -> None:
        super().__init__("failing", lossless)
        self.method, self.times, self.error, self.calls = method, times, error, 0

    def write(self, item: Any) -> None:
        self.fail("write")
        super().write(item)

    def flush(self) -> None:
        self.fail("flush")
        super().flush()

    def fail(self, method: str) -> None:
        if method == self.method:
            self.calls += 1
            if self.calls <= self.times:
                raise self.error()


def record(step: int) -> StepRecord:
    return StepRecord.of(step, float(step), {"a/a/a": 1.0})


def steps(sink: Any) -> list[int]:
    return [item.step for item in sink.items]


def wait_until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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


def test_a_hanging_sink_does_not_block_the_publisher() -> None:
    slow, fast = GatedSink(), ListSink("fast")
    bus = Bus([slow, fast])
    for step in range(500):
        bus.publish(record(step))
    assert slow.items == []  # it still stands still
    slow.gate.set()
    bus.close()
    assert steps(fast) == steps(slow) == list(range(500))


def test_a_slow_live_sink_loses_its_oldest_items_and_they_are_counted() -> None:
    sink = GatedSink()
    bus = Bus([sink], queue_bytes=10 * SIZE)
    bus.publish(record(0))
    assert sink.entered.wait(5)  # the sink has item 0 and the queue is empty
    for step in range(1, 31):
        bus.publish(record(step))
    wait_until(lambda: bus.dropped() == {"gated": 20})
    sink.gate.set()
    bus.close()
    assert steps(sink) == [0, *range(21, 31)]


def test_an_item_larger_than_the_queue_is_still_written() -> None:
    sink = ListSink()
    bus = Bus([sink], queue_bytes=10)
    bus.publish(record(0))
    bus.close()
    assert steps(sink) == [0]


# -- the lossless queue -----------------------------------------------------------------------


def wide(step: int) -> StepRecord:
    return StepRecord(step, float(step), WIDE, np.arange(1000.0) + step)


def test_a_slow_lossless_sink_loses_nothing_and_the_memory_stays_bounded() -> None:
    sink = GatedSink(lossless=True)
    bus = Bus([sink], queue_bytes=100_000)
    for step in range(1000):  # 8 MB
        bus.publish(wide(step) if step % 10 else Event(kind="alert", step=step, time=0.0))
        if step % 20 == 0:
            time.sleep(0.005)
    queue = bus._workers[0]._queue
    assert isinstance(queue, LosslessQueue)
    wait_until(lambda: len(queue) == 1000)
    assert queue._bytes <= 100_000
    sink.gate.set()
    bus.close()
    assert steps(sink) == list(range(1000))
    assert bus.dropped() == {"gated": 0}
    for item in sink.items:
        if isinstance(item, StepRecord):
            assert item.schema is WIDE
            np.testing.assert_array_equal(item.values, np.arange(1000.0) + item.step)


def test_a_full_spill_file_drops_and_counts_the_newest_records() -> None:
    sink = GatedSink(lossless=True)
    bus = Bus([sink], queue_bytes=40_000, spill_bytes=80_000)
    for step in range(200):
        bus.publish(wide(step))
        time.sleep(0.001)
    bus.publish(Event(kind="stop", step=200, time=0.0))
    queue = bus._workers[0]._queue
    assert isinstance(queue, LosslessQueue)
    wait_until(lambda: len(queue) + bus.dropped()["gated"] == 201)
    lost = bus.dropped()["gated"]
    assert 0 < lost < 200
    sink.gate.set()
    bus.close()
    assert steps(sink) == [*range(200 - lost), 200]


def test_the_spill_is_used_again_after_the_sink_has_caught_up() -> None:
    sink = GatedSink(lossless=True)
    bus = Bus([sink], queue_bytes=40_000, spill_bytes=500_000)
    for round_ in range(3):
        sink.gate.clear()
        for step in range(40):
            bus.publish(wide(100 * round_ + step))
            time.sleep(0.001)
        sink.gate.set()
        wait_until(lambda r=round_: len(sink.items) == 40 * (r + 1))
    bus.close()
    assert steps(sink) == [100 * r + s for r in range(3) for s in range(40)]
    assert bus.dropped() == {"gated": 0}


# -- failures ---------------------------------------------------------------------------------


def test_a_sink_that_keeps_failing_is_switched_off_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad, good = FailingSink("write"), ListSink("good")
    bus = Bus([bad, good])
    with caplog.at_level(logging.WARNING):
        for step in range(30):
            bus.publish(record(step))
        wait_until(lambda: bad.calls == MAX_FAILURES)
        began = time.perf_counter()
        bus.close(timeout=100)
    assert time.perf_counter() - began < 50  # closing does not wait for it
    assert bad.calls <= MAX_FAILURES + 1
    assert [item.step for item in good.items if isinstance(item, StepRecord)] == list(range(30))
    assert bus.dropped()["failing"] >= 30
    assert bus.dropped()["good"] == 0
    assert bad.closes == 1
    # The first failure, switching off, and at the end the number of lost items.
    assert len(caplog.records) == 3
    assert " lost " in caplog.records[-1].message


def test_a_sinks_failures_and_recovery_become_events_of_the_run() -> None:
    bad, good = FailingSink("write", MAX_FAILURES), ListSink("good")
    bus = Bus([bad, good])
    bus.publish(record(7))
    wait_until(lambda: len(good.items) == 4)
    bus.close()
    told = [item for item in good.items if isinstance(item, Event)]
    assert [(e.kind, e.step, e.data["sink"], e.data["state"]) for e in told] == [
        ("monitor", 7, "failing", state) for state in ("failed", "off", "on")
    ]
    assert "disk full" in told[0].data["error"]


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("method", ["write", "flush"])
def test_an_item_that_failed_with_an_os_error_is_written_once_the_sink_works(
    method: str, lossless: bool
) -> None:
    sink = FailingSink(method, MAX_FAILURES + 1, lossless=lossless)
    bus = Bus([sink])
    for step in range(30):
        bus.publish(record(step))
    wait_until(lambda: len(sink.items) >= 30 and sink.flushes > 0)
    bus.close()
    assert [i.step for i in sink.items if isinstance(i, StepRecord)] == list(range(30))
    assert bus.dropped() == {"failing": 0}


@pytest.mark.parametrize("lossless", [False, True])
def test_an_item_that_a_sink_rejects_is_dropped_and_the_next_one_written(
    lossless: bool,
) -> None:
    sink = FailingSink("write", 2, error=lambda: TypeError("what is this?"), lossless=lossless)
    bus = Bus([sink])
    for step in range(5):
        bus.publish(record(step))
    bus.close()
    assert [i.step for i in sink.items if isinstance(i, StepRecord)] == [2, 3, 4]
    assert bus.dropped() == {"failing": 2}


def test_closing_retries_a_lossless_sink_that_is_off_until_the_timeout() -> None:
    sink = FailingSink("write", MAX_FAILURES + 3, lossless=True)
    bus = Bus([sink])
    bus.publish(record(1))
    wait_until(lambda: sink.calls >= MAX_FAILURES)
    bus.close(timeout=10)
    assert steps(sink)[0] == 1
    hopeless = FailingSink("write", lossless=True)
    bus = Bus([hopeless])
    bus.publish(record(1))
    began = time.perf_counter()
    bus.close(timeout=1.0)
    assert time.perf_counter() - began < 15
    assert hopeless.closes == 1
    assert bus.dropped()["failing"] >= 1


def test_secrets_in_an_error_reach_neither_the_log_nor_the_events(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    text = "no answer from https://me:pw0rd@host/?token=abcdef with sk-0123456789"
    sink, good = FailingSink("write", 1, error=lambda: OSError(text)), ListSink("good")
    with caplog.at_level(logging.WARNING):
        bus = Bus([sink, good])
        bus.publish(record(0))
        bus.close()
    told = caplog.text + "".join(str(i.data) for i in good.items if isinstance(i, Event))
    assert "no answer from" in told
    for secret in ("pw0rd", "abcdef", "sk-0123456789"):
        assert secret not in told


def test_a_hanging_sink_is_named_in_the_log_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ulysses_monitor.bus.worker._HANG_SECONDS", 0.1)
    sink = GatedSink()
    bus = Bus([sink])
    bus.publish(record(0))
    assert sink.entered.wait(5)
    time.sleep(0.2)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            bus.publish(record(step))
        wait_until(lambda: "has not responded" in caplog.text)
        bus.publish(record(5))
        time.sleep(0.2)
    assert caplog.text.count("sink gated has not responded") == 1
    sink.gate.set()
    bus.close()


# -- the end ----------------------------------------------------------------------------------


def test_closing_ends_in_time_even_if_a_sink_hangs(caplog: pytest.LogCaptureFixture) -> None:
    hanging, good = GatedSink(lossless=True), ListSink("good")
    bus = Bus([hanging, good])
    bus.publish(record(0))
    began = time.perf_counter()
    with caplog.at_level(logging.ERROR):
        bus.close(timeout=0.5)
    assert time.perf_counter() - began < 15
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


def test_a_forked_child_neither_queues_nor_waits_nor_writes(tmp_path: Path) -> None:
    sink = GatedSink(lossless=True)
    bus = Bus([sink])
    bus.publish(record(0))
    assert sink.entered.wait(5)
    with bus._workers[0]._lock:  # like a fork in the middle of publishing
        child = os.fork()
        if child == 0:
            bus.publish(record(1))
            bus.close()
            os._exit(42)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 42
    sink.gate.set()
    bus.close()
    assert steps(sink) == [0]


def test_a_sink_is_opened_before_its_first_item_and_opening_is_retried(
    tmp_path: Path,
) -> None:
    class Opened(ListSink):
        tries = 0

        def open(self, run_dir: Path, info: Any) -> None:
            self.tries += 1
            if self.tries == 1:
                raise ConnectionError("not yet")
            self.items.append((run_dir, info))

    sink = Opened()
    bus = Bus([sink], (tmp_path, {"name": "run"}))
    bus.publish(record(1))
    wait_until(lambda: len(sink.items) >= 2)
    bus.close()
    assert sink.items[0] == (tmp_path, {"name": "run"})
    assert sink.items[1].step == 1


def test_without_room_to_spill_the_other_sinks_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("ulysses_monitor.bus.queues.TemporaryFile", nowhere)
    slow, good = GatedSink(lossless=True), ListSink("good", lossless=True)
    bus = Bus([slow, good], queue_bytes=800_000)
    for step in range(1000):  # 8 MB
        bus.publish(wide(step))
        time.sleep(0.0005)
    wait_until(lambda: len(good.items) == 1000)
    slow.gate.set()
    bus.close()
    lost = bus.dropped()["gated"]
    assert 0 < lost < 1000  # four times the memory limit is kept
    assert steps(slow) == list(range(1000 - lost))


def test_sinks_with_the_same_name_are_counted_separately() -> None:
    one, other = FailingSink("write", error=lambda: TypeError("no")), ListSink("failing")
    bus = Bus([one, other])
    bus.publish(record(1))
    bus.close()
    assert bus.dropped() == {"failing": 1, "failing-2": 0}


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_base_exception_does_not_end_a_sink_either(error: type[BaseException]) -> None:
    class Leaves(ListSink):
        def write(self, item: Any) -> None:
            if item.step == 1:
                raise error
            super().write(item)

    sink = Leaves()
    bus = Bus([sink])
    for step in range(4):
        bus.publish(record(step))
    assert bus.close()
    assert [i.step for i in sink.items if isinstance(i, StepRecord)] == [0, 2, 3]
    assert sink.closes == 1
