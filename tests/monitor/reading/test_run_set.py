"""Many runs at once: finding, tabulating, stacking and querying them; skipping broken ones."""

from __future__ import annotations

import builtins
import json
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from torch.utils.tensorboard import SummaryWriter

import ulysses_monitor as um
from tests.support.recorded import curve, training, write_run
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.sources import source_at
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.store import Location

LOSS = "train/loss/total"


def alert(step: int, rule: str) -> Event:
    return Event(kind="alert", step=step, time=float(step), data={"rule": rule, "value": 2.5})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs, one of them crashed, beside files and folders that are not runs."""
    runs = tmp_path / "runs"
    write_run(runs / "one", [*training(5), alert(2, "spike"), alert(4, "spike")])
    write_run(runs / "two", [*training(3), alert(1, "plateau")], "failed")
    write_run(runs / "three", curve(LOSS, [1.0, np.nan]), None)
    (runs / "notes").mkdir()
    (runs / ".cache").mkdir()
    (runs / "readme.txt").write_text("hello")
    return runs


def test_a_folder_opens_its_runs_and_nothing_else(folder: Path) -> None:
    runs = um.open_runs(folder)
    assert sorted(runs.names) == ["one", "three", "two"]
    assert [run.location.name for run in runs] == runs.names
    assert len(runs) == 3
    assert runs["two"].info["status"] == "failed"
    assert not runs.problems


def test_a_glob_a_list_and_a_single_run_open(folder: Path) -> None:
    assert um.open_runs(f"{folder}/t*").names == ["three", "two"]
    assert um.open_runs([folder / "two", str(folder / "one")]).names == ["two", "one"]
    assert um.open_runs(folder / "one").names == ["one"]


def test_runs_of_the_same_name_are_named_after_their_places(tmp_path: Path) -> None:
    for group in "ab":
        write_run(tmp_path / group / "seed", training(1))
    places = [str(tmp_path / group / "seed") for group in "ab"]
    assert um.open_runs(f"{tmp_path}/*/seed").names == places


def test_runs_of_other_tools_in_a_folder_are_found(tmp_path: Path) -> None:
    for name in ("board", "logs/train"):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("train/loss", 1.0, 7, 1e9)
    (tmp_path / "hf/checkpoint-2").mkdir(parents=True)
    log = {"global_step": 2, "max_steps": 2, "log_history": [{"step": 2, "loss": 0.5}]}
    (tmp_path / "hf/checkpoint-2/trainer_state.json").write_text(json.dumps(log))
    table = um.open_runs(tmp_path).table()
    assert sorted(table.index) == ["board", "hf", "train"]
    assert table.loc["hf", ["status", "step", "loss"]].tolist() == ["finished", 2, 0.5]
    assert table.loc["board", ["status", "step", "loss"]].tolist() == ["unknown", 7, 1.0]


def test_runs_at_urls_are_found_by_folder_glob_and_list(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4().hex}"
    memory.put(str(folder), f"{root}/runs", recursive=True)
    url = f"memory:/{root}/runs"
    for places in (url, f"{url}/*", [f"{url}/{name}" for name in ("one", "three", "two")]):
        runs = um.open_runs(places)
        assert runs.names == ["one", "three", "two"]
        assert runs.table()["step"].to_dict() == {"one": 5, "two": 3, "three": 2}
        assert len(runs.metrics(LOSS)) == 10
    memory.rm(root, recursive=True)


def test_only_a_folder_may_hold_no_runs(folder: Path, tmp_path: Path) -> None:
    for place, message in (
        (tmp_path / "nowhere", "no such folder"),
        (f"{folder}/x*", "nothing matches"),
        ([folder / "notes"], "no run.json there"),
    ):
        with pytest.raises(InputError, match=message):
            um.open_runs(place)
    (tmp_path / "empty").mkdir()
    runs = um.open_runs(tmp_path / "empty")
    assert len(runs) == 0
    assert runs.table().empty
    assert runs.metrics().empty
    assert runs.dataset().num_rows == 0
    assert runs.sql("SELECT count(*) AS n FROM runs WHERE loss > 0")["n"].tolist() == [0]


def test_an_unknown_name_suggests_the_nearest_and_is_never_a_path(folder: Path) -> None:
    runs = um.open_runs(folder)
    with pytest.raises(InputError, match="did you mean 'three'"):
        runs["thre"]
    with pytest.raises(InputError, match="is not among these 3 runs"):
        runs["../runs/one"]


def test_the_table_has_a_row_for_each_run(folder: Path) -> None:
    table = um.open_runs(folder).table()
    assert table.index.name == "run"
    assert table.loc["one", ["status", "engine", "step", "alerts"]].tolist() == [
        "finished",
        "ddp",
        5,
        2,
    ]
    assert table.loc["one", "loss"] == 5.0
    assert table["status"].to_dict() == {"one": "finished", "two": "failed", "three": "crashed"}
    assert list(table.index) == ["one", "two", "three"]  # oldest first
    assert str(table["started"].dtype).endswith("UTC]")
    assert np.isnan(table.loc["three", "loss"])


def test_metrics_stacks_all_runs_in_one_frame(folder: Path) -> None:
    runs = um.open_runs(folder)
    frame = runs.metrics(LOSS, "grad/norm/total")
    assert frame.index.names == ["run", "step"]
    pd.testing.assert_frame_equal(
        frame.loc["one"], runs["one"].metrics(LOSS, "grad/norm/total"), check_like=True
    )
    side_by_side = frame[LOSS].unstack("run")  # noqa: PD010 - there is nothing to aggregate
    assert side_by_side.loc[2, ["one", "two"]].tolist() == [8.0, 8.0]
    assert runs.metrics(LOSS, steps=(2, 2)).index.tolist() == [(name, 2) for name in runs.names]
    assert len(runs.metrics(LOSS, points=2).loc["one"]) == 2


def test_a_pattern_that_matches_in_no_run_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = um.open_runs(folder)
    for read in (runs.metrics, runs.dataset, lambda p: runs.sql("SELECT * FROM metrics", p)):
        with pytest.raises(InputError, match=r"metric of these runs.* mean 'train/loss/total'"):
            read("train/lss/total")
    assert runs.metrics("nothing", missing="ignore").empty
    assert runs.dataset("nothing", missing="ignore").num_rows == 0
    # The run `three` has a loss only.
    assert len(runs.metrics("grad/norm/total")) == 8
    assert not runs.problems
    assert not caplog.messages


def test_an_invalid_selection_is_refused_and_not_taken_for_a_broken_run(folder: Path) -> None:
    with pytest.raises(InputError, match="expected first <= last"):
        um.open_runs(folder).metrics(steps=(3, 1))


def test_the_dataset_holds_only_measured_values(folder: Path) -> None:
    table = um.open_runs(folder).dataset(LOSS, "grad/norm/total")
    assert table.schema.field("run").type == pa.dictionary(pa.int32(), pa.string())
    assert table.schema.field("metric").type == pa.dictionary(pa.int32(), pa.string())
    assert table.schema.names == ["run", "step", "time", "metric", "value"]
    frame = table.to_pandas()
    counts = frame.groupby(["run", "metric"], observed=True).size().to_dict()
    assert counts == {
        ("one", LOSS): 5,
        ("one", "grad/norm/total"): 5,
        ("two", LOSS): 3,
        ("two", "grad/norm/total"): 3,
        ("three", LOSS): 2,
    }
    row = frame[(frame.run == "one") & (frame.metric == LOSS) & (frame.step == 4)].iloc[0]
    assert (row["value"], row["time"]) == (6.0, 4.0)


# -- SQL ---------------------------------------------------------------------------------------


def test_a_query_joins_runs_metrics_and_events(folder: Path) -> None:
    answer = um.open_runs(folder).sql(
        """
        SELECT m.run, max(m.value) AS worst, any_value(r.status) AS status,
               (SELECT count(*) FROM events e WHERE e.run = m.run AND e.kind = 'alert'
                AND e.data->>'$.rule' = 'spike') AS spikes
        FROM metrics m JOIN runs r USING (run)
        WHERE m.metric = 'train/loss/total' AND r.status <> 'crashed'
        GROUP BY m.run ORDER BY m.run
        """,
        metrics="train/*",
    )
    assert answer.to_dict("records") == [
        {"run": "one", "worst": 9.0, "status": "finished", "spikes": 2},
        {"run": "two", "worst": 9.0, "status": "failed", "spikes": 0},
    ]


def test_a_query_reads_only_the_metrics_it_is_given(folder: Path) -> None:
    answer = um.open_runs(folder).sql(
        "SELECT DISTINCT metric FROM metrics", metrics=("grad/norm/total",)
    )
    assert answer["metric"].tolist() == ["grad/norm/total"]


def test_times_are_timestamps_in_sql(folder: Path) -> None:
    answer = um.open_runs(folder).sql(
        "SELECT run FROM runs WHERE started > TIMESTAMPTZ '2020-01-01' ORDER BY started"
    )
    assert answer["run"].tolist() == ["one", "two", "three"]
    assert len(um.open_runs(folder).sql("SELECT * FROM runs").columns) == 14
    pivot = "PIVOT metrics ON run USING max(value) GROUP BY metric"
    assert len(um.open_runs(folder).sql(pivot, LOSS)) == 1


@pytest.mark.parametrize(
    "query",
    [
        "COPY metrics TO 'stolen.csv'",
        "SELECT * FROM read_csv('secret.csv')",
        "SELECT * FROM 'secret.csv'",
        "ATTACH 'new.db'",
        "INSTALL httpfs",
        "EXPORT DATABASE 'folder'",
        "SET enable_external_access = true",
        "SELECT * FROM query",
        "CREATE TABLE mine AS SELECT 1",
        "SELECT 1; DROP VIEW metrics",
        "SELEC 1",
        "",
    ],
)
def test_a_query_cannot_reach_files_and_its_error_is_one_line(
    query: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.csv").write_text("a\n1\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"^sql: ") as caught:
        um.open_runs(folder).sql(query, metrics=LOSS)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_error_without_duckdb_names_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "duckdb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'ulysses-toolkit\[duckdb\]'"):
        um.open_runs(folder).sql("SELECT 1")


# -- broken runs -------------------------------------------------------------------------------


def test_a_broken_run_is_named_and_the_others_are_read(folder: Path) -> None:
    (folder / "two/run.json").write_text('{"name": "tw')
    (folder / "lost/metrics").mkdir(parents=True)
    runs = um.open_runs(folder)
    assert list(runs.problems) == [str(folder / "lost")]
    assert list(runs.table().index) == ["one", "three"]
    assert set(runs.problems) == {str(folder / "lost"), str(folder / "two")}
    assert "run.json: cannot be read" in runs.problems[str(folder / "two")]
    assert set(runs.metrics(LOSS).index.get_level_values("run")) == {"one", "two", "three"}
    assert list(runs.problems) == [str(folder / "lost")]


def test_a_folder_that_cannot_be_listed_is_a_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Location.is_file

    def refuse(location: Location) -> bool:
        if "/two" in location.path:
            raise PermissionError(f"no right to read {location.path}")
        return real(location)

    monkeypatch.setattr(
        "ulysses_monitor.reading.opening.source_at",
        lambda location: source_at(location) if refuse(location) is not None else None,
    )
    runs = um.open_runs(f"{folder}/*")
    assert runs.names == ["one", "three"]
    assert "no right to read" in runs.problems[str(folder / "two")]


def test_a_damaged_file_is_named_in_the_problems(folder: Path) -> None:
    (file,) = [p for p in (folder / "one/metrics").iterdir() if p.is_file()]
    content = bytearray(file.read_bytes())
    content[:] = bytes(len(content))
    file.write_bytes(content)
    runs = um.open_runs(folder)
    assert len(runs.table()) == 3
    assert list(runs.problems) == [str(folder / "one")]
    assert f"metrics/{file.name}" in runs.problems[str(folder / "one")]


def test_the_table_accepts_whatever_run_json_holds(folder: Path) -> None:
    path = folder / "one/run.json"
    values = [None, "text", [], {}, True, 1e400, [None], ["x"]]
    for value in values:
        keys = ("status", "starts", "ended", "max_steps", "engine", "world_size", "name", "step")
        path.write_text(json.dumps(dict.fromkeys(keys, value)))
        runs = um.open_runs(folder)
        assert set(runs.table().index) == {"one", "two", "three"}, (value, runs.problems)


def test_the_last_step_may_come_from_an_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/eval", [StepRecord.of(9, 1.0, {"eval/loss/total": 1.0})])
    assert um.open_runs(tmp_path / "runs").table().loc["eval", "step"] == 9
