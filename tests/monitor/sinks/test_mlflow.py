"""An MLflow server on this machine, with SQLite, returns what the sink sent."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.sinks.sink_items import (
    HOSTILE,
    NOT_FINITE,
    alert,
    deliver,
    hostile,
    many,
    on_a_thread,
    process,
    record,
    stop,
    wait_for,
)
from tests.support.ports import free_port
from ulysses_monitor.records import StepRecord
from ulysses_monitor.sinks.mlflow import MlflowSink

pytestmark = [pytest.mark.services, pytest.mark.timeout(180)]


class Server:
    """An MLflow server on one database that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
        log = self.folder / "log"
        self._stack.enter_context(process(command, log, env=os.environ | settings))
        wait_for(self._is_ready, 100)

    def _is_ready(self) -> bool:
        with urllib.request.urlopen(f"{self.uri}/health") as answer:  # noqa: S310 - ours
            return bool(answer.status == 200)

    def stop(self) -> None:
        self._stack.close()

    def run(self, name: str) -> Any:
        """Returns the only run with a name."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("ulysses")
        found = client.search_runs([experiment.experiment_id], f"run_name = '{name}'")
        assert len(found) == 1
        return found[0]

    def history(self, name: str, metric: str) -> list[Any]:
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri).get_metric_history(self.run(name).info.run_id, metric)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRACKING_URI", "TRACKING_USERNAME", "TRACKING_PASSWORD", "TRACKING_TOKEN"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("DO_NOT_TRACK", "true")


def sink_for(server: Server, name: str, config: Any = None) -> MlflowSink:
    sink = MlflowSink(server.uri)
    sink.open(Path("runs") / name, {"config": config or {}})
    return sink


def test_steps_arrive_with_their_times_in_a_finished_run(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = dict(os.environ)
    deliver(sink_for(server, "steps"), [record(1), alert(1), record(2), stop(2, "finished")])
    assert capfd.readouterr().out == ""
    assert dict(os.environ) == environment
    run = server.run("steps")
    history = server.history("steps", "grad/norm/layer/0")
    assert [(m.step, m.timestamp, m.value) for m in history] == [
        (1, 1_700_000_001_250, 0.5),
        (2, 1_700_000_002_250, 1.0),
    ]
    assert set(run.data.metrics) == {"train/loss/total", "grad/norm/layer/0"}
    assert run.data.tags["alert/spike"] == "step 1: It broke."
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("end", "status"), [("failed", "FAILED"), ("stopped", "KILLED"), (None, "FAILED")]
)
def test_the_mlflow_run_ends_with_the_status_of_the_training(
    server: Server, end: str | None, status: str
) -> None:
    deliver(sink_for(server, f"end-{end}"), [record(1), *([stop(1, end)] if end else [])])
    assert server.run(f"end-{end}").info.status == status


def test_the_config_becomes_parameters_within_mlflows_limits(server: Server) -> None:
    config = {
        "lora": {"rank": 8, "target": ["q", "v"]},
        "text": "x" * 10_000,
        "empty": {},
        "odd <name>\n": 1,
        "k" * 400: 2,
        **{f"key{i}": i for i in range(250)},
    }
    deliver(sink_for(server, "params", config), [record(1)])
    params = server.run("params").data.params
    assert params["lora.rank"] == "8"
    assert params["lora.target"] == "['q', 'v']"
    assert len(params["text"]) == 6000
    (odd,) = [value for key, value in params.items() if key.startswith("odd _name__")]
    (long,) = [value for key, value in params.items() if key.startswith("kkkk")]
    assert (odd, long) == ("1", "2")
    assert sum(key.startswith("key") for key in params) == 250


def test_nan_and_inf_are_accepted(server: Server) -> None:
    deliver(sink_for(server, "nan"), [StepRecord.of(1, 0.0, NOT_FINITE)])
    values = server.run("nan").data.metrics
    assert math.isnan(values["grad/norm/layer/0"])
    assert values["grad/norm/layer/1"] > 1e300  # its SQL store keeps Inf as the largest double
    assert values["grad/norm/layer/3"] == 0.5


def test_hostile_names_become_one_metric_each(server: Server) -> None:
    deliver(sink_for(server, "hostile"), [hostile(), alert(1, rule='r"<script>\n\ud800')])
    run = server.run("hostile")
    assert len(run.data.metrics) == len(HOSTILE)
    assert any(tag.startswith("alert/r__script_") for tag in run.data.tags)


def test_thousands_of_metrics_are_sent_in_batches(server: Server) -> None:
    deliver(sink_for(server, "many"), [many(1, 2500)])
    assert len(server.run("many").data.metrics) == 2500


def test_a_closed_sink_starts_another_run(server: Server) -> None:
    sink = sink_for(server, "first")
    deliver(sink, [record(1), stop(1, "finished")])
    sink.open(Path("runs/second"), {})
    deliver(sink, [record(1), stop(1, "failed")])
    assert server.run("first").info.status == "FINISHED"
    assert server.run("second").info.status == "FAILED"


def test_secrets_reach_neither_the_server_nor_a_log(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "swordfish-0123")
    config = {"hf_token": "s3cr3t-one", "url": "http://user:s3cr3t-two@host/"}
    items = [record(1), alert(1, message="refused: swordfish-0123")]
    deliver(sink_for(server, "secrets", config), items)
    kept = b"".join(p.read_bytes() for p in server.folder.glob("mlflow.db*")).decode("latin1")
    kept += (server.folder / "log").read_text() + caplog.text
    assert "secrets" in kept
    assert "swordfish" not in kept
    assert "s3cr3t" not in kept


def test_a_refusal_is_distinguished_from_an_unreachable_server(server: Server) -> None:
    from mlflow.exceptions import MlflowException

    sink = MlflowSink(server.uri, experiment="x" * 600)
    with pytest.raises(MlflowException):
        on_a_thread(lambda: sink.write(record(1)))


def test_a_sink_continues_when_the_server_comes_up_and_comes_back(server: Server) -> None:
    sink = sink_for(server, "away")
    server.stop()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            on_a_thread(lambda: sink.write(record(1)))
    server.start()
    on_a_thread(lambda: sink.write(record(1)))
    server.stop()
    with pytest.raises(ConnectionError):
        on_a_thread(lambda: sink.write(record(2)))
    with pytest.raises(ConnectionError):
        on_a_thread(sink.close)
    server.start()
    deliver(sink, [record(2), stop(2, "finished")])
    assert [m.step for m in server.history("away", "train/loss/total")] == [1, 2]
    assert server.run("away").info.status == "FINISHED"
