"""Items for tests of sinks, and servers that tests start and always stop."""

from __future__ import annotations

import contextlib
import http.server
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ulysses_monitor.records import Alert, Event, StepRecord

T = TypeVar("T")

HOSTILE = (
    'grad/norm/layer/"quoted"',
    "grad/norm/layer/line\nbreak",
    "grad/norm/layer/<script>alert(1)</script>",
    "grad/norm/layer/größe-层-🙂",
    "grad/norm/layer/back\\slash,comma;'",
    "grad/norm/layer/../../etc/passwd",
    "grad/norm/layer/lone\ud800surrogate",
    "=HYPERLINK(1)/norm/total",
    "+a/b/total",
    "-a/b/total",
    "@a/b/total",
    "//",
    "",
)
"""Metric names that a model or a user's code could produce."""

NOT_FINITE = {
    "grad/norm/layer/0": math.nan,
    "grad/norm/layer/1": math.inf,
    "grad/norm/layer/2": -math.inf,
    "grad/norm/layer/3": 0.5,
}


def record(step: int, time_: float = 1_700_000_000.25, **metrics: float) -> StepRecord:
    """Returns a record with the usual names; keywords add more, with ``__`` for ``/``."""
    usual = {
        "train/loss/total": 3.0 / step,
        "grad/norm/layer/0": 0.5 * step,
        "grad/norm/param/layers.0.weight": 1.0,
        "lora/grad_ratio_B_A/module/layers.0.q": 2.0,
    }
    more = {name.replace("__", "/"): value for name, value in metrics.items()}
    return StepRecord.of(step, time_ + step, usual | more)


def many(step: int, count: int) -> StepRecord:
    return StepRecord.of(step, 1_700_000_000.0, {f"m/v/layer/{i}": float(i) for i in range(count)})


def hostile(step: int = 1) -> StepRecord:
    values = {name: float(i) for i, name in enumerate(HOSTILE)}
    return StepRecord.of(step, 1_700_000_000.0, values)


def alert(step: int, rule: str = "spike", message: str = "It broke.") -> Event:
    finding = Alert(
        rule=rule,
        step=step,
        metric="a/b/c",
        value=1.0,
        threshold=0.5,
        message=message,
        severity="critical",
    )
    return finding.to_event(1_700_000_000.0)


def stop(step: int, status: str) -> Event:
    return Event(kind="stop", step=step, time=1_700_000_100.0, data={"status": status})


def on_a_thread(work: Callable[[], T]) -> T:
    """Runs `work` on another than the main thread, as sinks do."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised again below
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    assert outcome, "the sink did not return"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def deliver(sink: Any, items: Sequence[Any]) -> None:
    """Writes, flushes and closes on one worker thread, as the bus does."""

    def work() -> None:
        for item in items:
            sink.write(item)
        sink.flush()
        sink.close()

    on_a_thread(work)


def wait_for(what: Callable[[], T], seconds: float = 30.0) -> T:
    """Returns the first true result of `what`."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found := what():
                return found
        assert time.monotonic() < deadline, "nothing came in time"
        time.sleep(0.1)


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server in its own process group, which is always ended."""
    with log.open("ab") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, **more)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(5)


class Receiver:
    """An HTTP server on this machine that keeps what it receives.

    Attributes:
        bodies: what came, in order.
        answers: status codes to give, the last one for ever.
    """

    def __init__(self, port: int = 0) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.answers = [200]
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                receiver.bodies.append(self.rfile.read(length))
                receiver.paths.append(self.path)
                receiver.headers.append(dict(self.headers))
                more = len(receiver.answers) > 1
                self.send_response(receiver.answers.pop(0) if more else receiver.answers[0])
                self.send_header("Content-Length", "0")
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        http.server.ThreadingHTTPServer.allow_reuse_address = True
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])
        self._thread.start()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
