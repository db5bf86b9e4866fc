"""Sinks given by name see a whole run of the monitor and never harm it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import ulysses_monitor as um
from tests.monitor.sinks.sink_items import Receiver
from tests.support.ports import free_port
from ulysses_monitor.records import Event


def train(monitor: um.Monitor, steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with monitor.watch(model, optimizer):
        for _ in range(steps):
            loss = model(torch.randn(2, 4)).square().mean()
            monitor.observe(loss=loss, tokens=2)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_files_are_in_the_run_directory_and_agree_with_the_store(tmp_path: Path) -> None:
    train(um.Monitor(tmp_path / "run", tensorboard=False, sinks=["csv", "jsonl"]))  # type: ignore[list-item]
    stored = um.open_run(tmp_path / "run").metrics("grad/norm/*")
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    wide = table.pivot_table(index="step", columns="metric", values="value")
    for name in stored.columns:
        assert wide[name].tolist() == pytest.approx(stored[name].tolist(), rel=1e-6)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    kinds = [line["kind"] for line in map(json.loads, text.splitlines()) if "kind" in line]
    assert (kinds[0], kinds[-1]) == ("start", "stop")


@pytest.mark.services
@pytest.mark.timeout(120)
def test_unreachable_services_affect_neither_the_training_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HOOK", f"{nobody}/s3cr3t")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    expected = train(um.Monitor(tmp_path / "plain", tensorboard=False)).state_dict()
    sinks: list[Any] = [
        {"mlflow": {"tracking_uri": nobody}},
        {"opentelemetry": {"endpoint": nobody, "timeout": 0.5}},
        {"webhook": {"url_env": "HOOK", "kinds": ["start", "alert"]}},
        {"prometheus": {"port": 0}},
    ]
    before = {thread.name for thread in threading.enumerate()}
    trained = train(um.Monitor(tmp_path / "run", tensorboard=False, sinks=sinks)).state_dict()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    run = um.open_run(tmp_path / "run")
    assert len(run.metrics("train/loss/total")) == 3
    everything = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert b"s3cr3t" not in everything
    left = {thread.name for thread in threading.enumerate()} - before
    assert not any("prometheus" in name.lower() for name in left)


def test_alerts_reach_a_webhook_with_the_name_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Always:
        name = "always"

        def check(self, history: Any) -> list[um.Alert]:
            step = history[-1].step
            if step > 1:
                return []
            return [
                um.Alert(
                    rule="always", step=step, metric="a/b/c", value=1.0, threshold=0.0, message="M"
                )
            ]

    with Receiver() as receiver:
        monkeypatch.setenv("HOOK", f"http://127.0.0.1:{receiver.port}/")
        sinks: list[Any] = [{"webhook": {"url_env": "HOOK"}}]
        train(um.Monitor(tmp_path / "demo", tensorboard=False, sinks=sinks, rules=[Always()]))
    texts = [json.loads(body)["text"] for body in receiver.bodies]
    assert texts == ["[demo] step 1: warning always: M"]


def test_a_users_own_class_becomes_a_sink_by_its_import_path(tmp_path: Path) -> None:
    OwnSink.seen.clear()
    train(um.Monitor(tmp_path / "r", tensorboard=False, sinks=[f"{__name__}:OwnSink"]))  # type: ignore[list-item]
    kinds = [item.kind for item in OwnSink.seen if isinstance(item, Event)]
    assert kinds[0] == "start"
    assert len(OwnSink.seen) >= 5


class OwnSink:
    seen: list[Any] = []  # noqa: RUF012

    def write(self, item: Any) -> None:
        self.seen.append(item)

    def flush(self) -> None: ...
    def close(self) -> None: ...
