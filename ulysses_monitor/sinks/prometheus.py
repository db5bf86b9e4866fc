"""Serves the newest value of each metric on a page that a Prometheus server scrapes."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from ulysses_monitor.common.settings import Text, checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import escape_surrogates
from ulysses_monitor.sinks.arguments import Patterns, require_library
from ulysses_monitor.sinks.selection import Selection

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector

__all__ = ["PrometheusSink"]

_OURS = ("ulysses_step", "ulysses_alerts", "ulysses_alerts_total")


class PrometheusSink:
    """Serves ``ulysses_<family>_<stat>{run, scope}``, ``ulysses_step``, ``ulysses_alerts_total``.

    The page has no password: anyone who reaches the port can read the metrics.

    Args:
        port: port of the page; 0 picks a free one, see the attribute `port`.
        host: address to listen on.
        metrics: patterns of the metrics to serve; all but modules and parameters by default.

    Raises:
        InputError: an argument is wrong, or prometheus-client is not installed.

    Attributes:
        port: port of the page, once the first item is written.
    """

    name = "prometheus"

    @checked_arguments("sink prometheus")
    def __init__(
        self,
        port: Annotated[int, Field(ge=0, le=65535)] = 9464,
        host: Text = "127.0.0.1",
        metrics: Patterns | None = None,
    ) -> None:
        self._selection = Selection(metrics)
        require_library(self.name, "prometheus_client")
        self.port = self._wanted = port
        self._host = host
        self._run = "run"
        self._page = _Page()
        self._server: tuple[Any, threading.Thread] | None = None

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Sets the name of the run."""
        self._run = escape_surrogates(str(info.get("name") or run_dir.name))

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`.

        Raises:
            OSError: the port is in use.
        """
        if self._server is None:
            self._serve()
        if isinstance(item, StepRecord):
            self._page.update(item.step, self._selection.items(item))
        elif item.kind == "alert":
            self._page.count(str(item.data.get("rule")), str(item.data.get("severity")))

    def _serve(self) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._page = _Page(self._run)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(cast("Collector", self._page))
        try:
            server, thread = start_http_server(self._wanted, self._host, registry)
        except OSError as error:
            place = f"{self._host}:{self._wanted}"
            raise OSError(
                error.errno, f"{place}: {error.strerror}; choose another port, or 0 for a free one"
            ) from None
        self._server = server, thread
        self.port = server.server_port

    def flush(self) -> None:
        """Does nothing, because a scrape sees what was written."""

    def close(self) -> None:
        """Closes the page; a later `write` opens it again."""
        if self._server is not None:
            (server, thread), self._server = self._server, None
            server.shutdown()
            server.server_close()
            thread.join()


class _Page:
    """The values on the page; the sink's thread writes them, the server's thread reads them."""

    def __init__(self, run: str = "run") -> None:
        self._run = run
        self._lock = threading.Lock()
        self._step = 0
        self._values: dict[str, dict[str, float]] = {}
        self._alerts: Counter[tuple[str, str]] = Counter()

    def update(self, step: int, items: Iterator[tuple[str, float]]) -> None:
        """Updates the values of a record; other metrics, such as sampled ones, keep theirs."""
        with self._lock:
            self._step = step
            for name, value in items:
                family, scope = _family_and_scope(name)
                self._values.setdefault(family, {})[scope] = value

    def count(self, rule: str, severity: str) -> None:
        """Counts an alert."""
        with self._lock:
            self._alerts[escape_surrogates(rule), escape_surrogates(severity)] += 1

    def collect(self) -> list[Metric]:
        """Returns a consistent snapshot, for a registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            step = GaugeMetricFamily(
                "ulysses_step", "Number of the optimizer step.", labels=["run"]
            )
            step.add_metric([self._run], self._step)
            alerts = CounterMetricFamily(
                "ulysses_alerts", "Number of alerts.", labels=["run", "rule", "severity"]
            )
            for (rule, severity), count in self._alerts.items():
                alerts.add_metric([self._run, rule, severity], count)
            families: list[Metric] = [step, alerts]
            for name, scopes in self._values.items():
                family = GaugeMetricFamily(name, f"Metric {name}.", labels=["run", "scope"])
                for scope, value in scopes.items():
                    family.add_metric([self._run, scope], value)
                families.append(family)
        return families


def _family_and_scope(name: str) -> tuple[str, str]:
    *family, scope = name.split("/", 2)
    legal = re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(["ulysses", *family]))
    # A name that clashes with another family would make the whole page unreadable.
    return (f"{legal}_" if legal in _OURS else legal), escape_surrogates(scope)
