"""A Prometheus server on this machine scrapes the sink's page and answers over its API."""

from __future__ import annotations

import json
import math
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.sinks.sink_items import (
    HOSTILE,
    NOT_FINITE,
    alert,
    hostile,
    many,
    on_a_thread,
    process,
    record,
    wait_for,
)
from tests.support.ports import free_port
from ulysses_monitor.records import StepRecord
from ulysses_monitor.sinks.prometheus import PrometheusSink

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]

CONFIG = """
global: {{scrape_interval: 500ms, scrape_timeout: 400ms}}
scrape_configs:
  - job_name: ulysses
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""

Ask = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Ask]]:
    """The port that the server scrapes, and a function that queries the server."""
    folder = tmp_path_factory.mktemp("prometheus")
    scraped, own = free_port(), free_port()
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(port=scraped))
    binary = shutil.which("prometheus")
    assert binary, "the prometheus server is not installed"
    command = [
        binary,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{own}",
    ]

    def ask(query: str) -> list[dict[str, Any]]:
        text = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"http://127.0.0.1:{own}/api/v1/query?{text}") as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result

    def is_ready() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{own}/-/ready") as answer:
            return bool(answer.status == 200)

    with process(command, folder / "log"):
        wait_for(is_ready)
        yield scraped, ask


@pytest.fixture
def sink(place: tuple[int, Ask], request: pytest.FixtureRequest) -> Iterator[PrometheusSink]:
    sink = PrometheusSink(place[0])
    sink.open(Path("runs") / request.node.name, {})
    yield sink
    on_a_thread(sink.close)


def of(request: pytest.FixtureRequest) -> str:
    return f'run="{request.node.name}"'


def test_the_server_sees_the_newest_values(
    sink: PrometheusSink, place: tuple[int, Ask], request: pytest.FixtureRequest
) -> None:
    for step in (1, 2):
        on_a_thread(lambda step=step: sink.write(record(step)))  # type: ignore[misc]
    on_a_thread(lambda: sink.write(alert(2)))
    on_a_thread(lambda: sink.write(alert(3)))
    _, ask = place
    selector = of(request)
    (step_,) = wait_for(lambda: ask(f"ulysses_step{{{selector}}} == 2"))
    assert step_["metric"]["job"] == "ulysses"
    (norm,) = ask(f'ulysses_grad_norm{{{selector},scope="layer/0"}}')
    assert float(norm["value"][1]) == 1.0
    assert float(ask(f"ulysses_train_loss{{{selector}}}")[0]["value"][1]) == 1.5
    (alerts,) = wait_for(lambda: ask(f"ulysses_alerts_total{{{selector}}} == 2"))
    assert (alerts["metric"]["rule"], alerts["metric"]["severity"]) == ("spike", "critical")
    assert ask(f'ulysses_grad_norm{{{selector},scope=~"param/.*"}}') == []
    assert ask(f"ulysses_lora_grad_ratio_B_A{{{selector}}}") == []


def test_the_server_accepts_nan_and_inf(
    sink: PrometheusSink, place: tuple[int, Ask], request: pytest.FixtureRequest
) -> None:
    on_a_thread(lambda: sink.write(StepRecord.of(1, 0.0, NOT_FINITE)))
    found = wait_for(lambda: place[1](f"ulysses_grad_norm{{{of(request)}}}"))
    values = {series["metric"]["scope"]: float(series["value"][1]) for series in found}
    assert math.isnan(values.pop("layer/0"))
    assert values == {"layer/1": math.inf, "layer/2": -math.inf, "layer/3": 0.5}


def test_the_server_accepts_hostile_names(
    sink: PrometheusSink, place: tuple[int, Ask], request: pytest.FixtureRequest
) -> None:
    collisions = {"step/x/y": 1.0, "alerts/total/a": 2.0, "a/b-c/t": 3.0, "a/b_c/t": 4.0}
    on_a_thread(lambda: sink.write(hostile()))
    on_a_thread(lambda: sink.write(StepRecord.of(1, 0.0, collisions)))
    on_a_thread(lambda: sink.write(alert(1, rule='r"\n\\<script>\ud800')))
    found = wait_for(lambda: place[1](f"ulysses_grad_norm{{{of(request)}}}"))
    expected = {n.split("/", 2)[2].replace("\ud800", "\\ud800") for n in HOSTILE if "grad/" in n}
    assert {series["metric"]["scope"] for series in found} == expected
    (rule,) = place[1](f"ulysses_alerts_total{{{of(request)}}}")
    assert rule["metric"]["rule"] == 'r"\n\\<script>\\ud800'


def test_the_server_accepts_thousands_of_metrics(
    sink: PrometheusSink, place: tuple[int, Ask], request: pytest.FixtureRequest
) -> None:
    on_a_thread(lambda: sink.write(many(1, 5000)))
    (count,) = wait_for(lambda: place[1](f"count(ulysses_m_v{{{of(request)}}}) == 5000"))
    assert count


def test_the_page_closes_with_the_sink_and_reopens_with_the_next_item(
    sink: PrometheusSink, place: tuple[int, Ask]
) -> None:
    ask = place[1]
    for _ in range(2):
        on_a_thread(lambda: sink.write(record(1)))
        wait_for(lambda: ask('up{job="ulysses"} == 1'))
        on_a_thread(sink.close)
        wait_for(lambda: ask('up{job="ulysses"} == 0'))


def test_a_port_in_use_is_an_error_until_it_is_free() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        sink = PrometheusSink(other.getsockname()[1])
        for _ in range(2):
            with pytest.raises(OSError, match="in use"):
                on_a_thread(lambda: sink.write(record(1)))
    on_a_thread(lambda: sink.write(record(2)))
    assert b"ulysses_step" in page(sink)
    on_a_thread(sink.close)
    with pytest.raises(urllib.error.URLError):
        page(sink)


def page(sink: PrometheusSink) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics") as answer:
        return bytes(answer.read())


def test_port_0_picks_a_free_port_on_this_machine_only() -> None:
    sink = PrometheusSink(0)
    assert sink.port == 0
    on_a_thread(lambda: sink.write(record(1)))
    assert sink.port > 0
    assert b"ulysses_train_loss" in page(sink)
    assert sink._server is not None
    assert sink._server[0].server_address[0] == "127.0.0.1"
    on_a_thread(sink.close)
