"""Writes through the Trackio sink and reads back; a script for an environment with trackio."""

from __future__ import annotations

import math
import socket
import sys
from pathlib import Path
from typing import Any

from tests.monitor.sinks.sink_items import HOSTILE, alert, deliver, hostile, record
from ulysses_monitor.records import StepRecord
from ulysses_monitor.sinks.trackio import TrackioSink

NOT_FINITE = {"a/b/total": math.nan, "a/c/total": math.inf}


def refuse(*address: Any) -> None:
    """Stands in for every way out of this machine."""
    raise AssertionError(f"the network was touched: {address}")


def check(storage: Any, run: dict[str, str]) -> None:
    """Checks one run: rows, NaN and Inf, names, the alert and the config."""
    where = {"run_id": run["id"]}
    rows = storage.get_logs("p", run["name"], **where)
    values = {name: value for row in rows for name, value in row.items()}
    assert sorted(row["step"] for row in rows) == [1, 1, 2], rows
    assert math.isnan(values["a/b/total"])
    assert values["a/c/total"] == math.inf
    assert values["train/loss/total"] == 3.0
    assert "grad/norm/param/layers.0.weight" not in values
    assert values['grad/norm/layer/"quoted"'] == float(HOSTILE.index('grad/norm/layer/"quoted"'))
    config = storage.get_run_config("p", run["name"], **where)
    assert (config["lr"], config["hf_token"], config["nan"]) == (0.1, "***", "nan"), config
    (found,) = storage.get_alerts("p", run["name"], **where)
    assert (found["title"], found["level"], found["step"]) == ("spike", "error", 1), found


def main() -> None:
    """Records two runs of one name with no way out of the machine, and checks both."""
    socket.socket.connect = refuse  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    for _ in range(2):
        sink = TrackioSink(project="p")
        sink.open(Path("demo"), {"config": {"lr": 0.1, "hf_token": "s3cr3t", "nan": math.nan}})
        deliver(sink, [record(1), StepRecord.of(2, 0.0, NOT_FINITE), hostile(), alert(1)])
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_run_records("p")
    assert [run["name"] for run in runs] == ["demo", "demo"], runs
    for run in runs:
        check(SQLiteStorage, run)
    sys.stdout.write("ok\n")


if __name__ == "__main__":
    main()
