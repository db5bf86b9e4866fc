from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import ulysses_monitor as um
from tests.support.recorded import curve, training, write_run
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink


def test_patterns_select_columns_and_no_pattern_selects_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(3))
    assert list(run.metrics("grad/norm/layer/*")) == ["grad/norm/layer/0", "grad/norm/layer/10"]
    assert list(run.metrics("grad/norm/total", "train/loss/*")) == [
        "train/loss/total",
        "grad/norm/total",
    ]
    assert len(run.metrics().columns) == 8
    assert run.metrics("Grad/*", missing="ignore").empty  # case matters
    assert run.metrics("no/such/*", missing="ignore").shape == (0, 0)
    assert run.metrics().index.name == "step"


@pytest.mark.parametrize(
    ("pattern", "ending"),
    [
        ("train/los/total", "matches one (did you mean 'train/loss/total'?)"),
        ("grad/nrom/layer/*", "matches one (did you mean 'grad/norm/layer/0'?)"),
        ("loss", "matches one (did you mean 'train/loss/total'?)"),
        ("grad_norm", "matches one (did you mean 'grad/norm/total'?)"),
        ("overhead", "matches one (did you mean 'monitor/overhead_seconds/total'?)"),
        ("typo", "matches one, such as train/*, grad/*, lora/*, monitor/*"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(
    tmp_path: Path, pattern: str, ending: str
) -> None:
    run = write_run(tmp_path / "run", training(2))
    for read in (run.metrics, run.block, run.times):
        with pytest.raises(InputError) as caught:
            read(pattern)
        assert str(caught.value) == (
            f"metrics: pattern is {pattern!r}; expected a metric of {run}, or a pattern that "
            f"{ending}; missing='ignore' returns an empty result"
        )


def test_one_pattern_of_several_that_matches_nothing_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run", training(2))
    for _ in range(2):
        assert list(run.metrics("train/loss/total", "grad/nrm/total")) == ["train/loss/total"]
    (message,) = caplog.messages
    assert message.endswith("(did you mean 'grad/norm/total'?)")
    with pytest.raises(InputError, match="missing is 'warn'; allowed: raise, ignore"):
        run.metrics("train/*", missing="warn")  # type: ignore[arg-type]


def test_a_live_run_with_no_metrics_yet_returns_an_empty_frame(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    run = um.open_run(tmp_path / "run")
    assert run.metrics("train/loss/total").empty
    sink = StoreSink(directory)
    sink.write(training(1)[0])
    sink.flush()
    assert len(run.metrics("train/loss/total")) == 1
    with pytest.raises(InputError, match="did you mean 'train/loss/total'"):
        run.metrics("train/lss/total")
    sink.close()
    directory.release()


def test_an_unknown_kind_of_event_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [Event(kind="mine", step=1, time=0.0)])
    for read in (run.events, run.event_list):
        with pytest.raises(InputError) as caught:
            read("alrt")
        assert str(caught.value) == (
            "events: kind is 'alrt' (did you mean 'alert'?); allowed: start, stop, alert, action, "
            "control, eval, answers, rows, rerun, checkpoint, monitor, mine"
        )
    assert run.events("alert").empty
    assert len(run.events("mine")) == 1
    assert run.events("later", missing="ignore").empty


def test_events_are_selected_by_kind_and_survive_a_torn_last_line(tmp_path: Path) -> None:
    events = [
        Event(kind="start", step=0, time=0.0, data={"engine": "ddp"}),
        Event(kind="alert", step=4, time=1.0, data={"rule": "spike", "value": float("nan")}),
    ]
    run = write_run(tmp_path / "run", events, None)
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write('{"kind": "alert", "step": 5, "rul')
    assert run.events()["kind"].tolist() == ["start", "alert"]
    alerts = run.events("alert")
    assert alerts["step"].tolist() == [4]
    assert alerts["value"].tolist() == ["nan"]
    assert run.events("checkpoint").empty


def test_every_line_of_events_is_strict_json(tmp_path: Path) -> None:
    data = {"value": float("inf"), "many": [float("nan"), 1.0], "deep": {"x": -float("inf")}}
    write_run(tmp_path / "run", [Event(kind="alert", step=1, time=0.0, data=data)])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "run/events.jsonl").read_text(), parse_constant=refuse)
    assert (line["value"], line["many"], line["deep"]) == ("inf", ["nan", 1.0], {"x": "-inf"})


def test_a_message_with_unusual_line_separators_is_one_event(tmp_path: Path) -> None:
    message = "first\u2028second\x85third\nfourth\x0cfifth"
    run = write_run(tmp_path / "run", [Event(kind="a", step=1, time=0.0, data={"m": message})])
    assert run.events()["m"].tolist() == [message]


def test_a_running_run_that_no_process_writes_has_crashed(tmp_path: Path) -> None:
    assert write_run(tmp_path / "a", [], None).info["status"] == "crashed"
    assert write_run(tmp_path / "b", [], "stopped").info["status"] == "stopped"
    directory = RunDirectory(tmp_path / "c")
    directory.start({})
    assert um.open_run(tmp_path / "c").info["status"] == "running"
    directory.release()


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json there"):
        um.open_run(tmp_path)


def test_the_summary_holds_the_numbers_of_a_run(tmp_path: Path) -> None:
    events = [Event(kind="alert", step=2, time=0.0), Event(kind="start", step=0, time=0.0)]
    held_out = [StepRecord.of(s, 100.0 + s, {"eval/loss/total": 5.0 - s}) for s in (2, 4)]
    summary = write_run(tmp_path / "run", [*training(8), *held_out, *events]).summary()
    assert summary["name"] == "run"
    assert (summary["engine"], summary["world_size"], summary["steps"]) == ("ddp", 2, 8)
    assert summary["loss_first"] == pytest.approx(7.0)  # mean of 9 ... 5
    assert summary["loss_last"] == pytest.approx(4.0)  # mean of 6 ... 2
    assert (summary["eval_loss_first"], summary["eval_loss_last"]) == (3.0, 1.0)
    assert summary["tokens_per_second"] == pytest.approx(100.0)
    assert summary["grad_norm_first"] == summary["grad_norm_last"] == 1.0
    assert summary["lora_ratio_first"] == np.inf
    assert summary["lora_ratio_last"] == pytest.approx(1.25)
    assert summary["alerts"] == 1
    assert summary["monitor_share"] == pytest.approx(0.01)


def test_the_summary_of_an_empty_run_has_no_numbers(tmp_path: Path) -> None:
    summary = write_run(tmp_path / "run", [], None).summary()
    assert (summary["status"], summary["steps"], summary["alerts"]) == ("crashed", 0, 0)
    assert summary["loss_first"] is None
    assert summary["monitor_share"] is None


# -- selecting ---------------------------------------------------------------------------------


def test_names_have_the_order_of_the_schema(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(2))
    assert run.names() == list(run.metrics().columns)
    assert run.names("grad/norm/layer/*") == ["grad/norm/layer/0", "grad/norm/layer/10"]
    assert run.names("no/such/*") == []


def test_a_range_of_steps_includes_both_ends_and_either_may_be_open(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(10))
    assert run.metrics(steps=(3, 5)).index.tolist() == [3, 4, 5]
    assert run.metrics(steps=(None, 2)).index.tolist() == [1, 2]
    assert run.metrics(steps=(9, None)).index.tolist() == [9, 10]
    assert run.metrics(steps=(20, 30)).empty


def test_a_range_of_times_takes_seconds_datetimes_or_iso_strings(tmp_path: Path) -> None:
    start = datetime(2026, 1, 2, 3, 4, 0, tzinfo=UTC)
    values = curve("train/loss/total", range(10), start=start.timestamp())
    run = write_run(tmp_path / "run", values)
    expected = [3, 4]
    seconds = (start.timestamp() + 3, start.timestamp() + 4)
    moments = [datetime.fromtimestamp(t, UTC) for t in seconds]
    for first, last in (
        seconds,
        moments,
        [m.isoformat() for m in moments],
        [pd.Timestamp(m) for m in moments],
        [datetime.fromtimestamp(t).isoformat() for t in seconds],
    ):
        assert run.metrics(times=(first, last)).index.tolist() == expected
    assert run.metrics(times=(moments[1], None), steps=(None, 5)).index.tolist() == [4, 5]


def test_a_clock_that_was_set_back_does_not_hide_steps(tmp_path: Path) -> None:
    times = [100.0, 101.0, 50.0, 51.0, 102.0]
    items = [StepRecord.of(step, at, {"train/loss/total": 1.0}) for step, at in enumerate(times, 1)]
    run = write_run(tmp_path / "run", items)
    assert run.metrics(times=(100, 102)).index.tolist() == [1, 2, 5]
    assert run.metrics(times=(None, 60)).index.tolist() == [3, 4]
    assert run.times().tolist() == times
    assert run.times().index.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"steps": 5}, "steps is 5; expected (first, last)"),
        ({"steps": (1.5, None)}, "steps has the limit 1.5; expected integers or None"),
        ({"steps": (5, 1)}, "steps is (5, 1); expected first <= last"),
        (
            {"times": ("yesterday-ish", None)},
            "times has the limit 'yesterday-ish'; expected",
        ),
        ({"times": (float("nan"), None)}, "times has the limit nan"),
        ({"points": 1}, "points is 1; expected"),
        ({"points": 5.0}, "points is 5.0; expected"),
    ],
)
def test_an_invalid_selection_is_refused_in_one_line(
    tmp_path: Path, selection: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path / "run", training(3))
    with pytest.raises(InputError) as caught:
        run.metrics(**selection)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_points_reduces_a_frame_to_recorded_rows(tmp_path: Path) -> None:
    values = np.sin(np.arange(500) / 20)
    values[321] = 40.0
    run = write_run(tmp_path / "run", curve("train/loss/total", values))
    whole, thinned = run.metrics(), run.metrics(points=50)
    assert len(thinned) <= 50
    assert thinned.equals(whole.loc[thinned.index])
    assert 322 in thinned.index
    assert list(thinned.index[[0, -1]]) == [1, 500]


# -- damaged and live runs ----------------------------------------------------------------------


def test_a_damaged_file_is_logged_once_and_the_rest_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    sink = StoreSink(directory)
    for step in range(1, 101):
        sink.write(StepRecord.of(step, step, {"train/loss/total": 1.0}))
        sink.write(StepRecord.of(step, step, {"eval/loss/total": 2.0}))
    sink.flush()
    first = min(p for p in (tmp_path / "run/metrics").iterdir())
    content = bytearray(first.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    first.write_bytes(content)
    run = um.open_run(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        assert run.metrics()["eval/loss/total"].notna().sum() == 100
        run.metrics()
    assert list(run.damaged) == [f"metrics/{first.name}"]
    assert [first.name in line for line in caplog.messages] == [True]
    directory.release()


def test_a_damaged_run_json_is_an_input_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training(2))
    for content in ('{"name": "ru', "[1, 2]"):
        (tmp_path / "run/run.json").write_text(content)
        with pytest.raises(InputError, match=r"run\.json"):
            _ = run.info
        assert len(run.metrics()) == 2


def test_lines_that_are_not_events_are_skipped_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path / "run", [])
    lines = ['{"kind": "note"}', "[]", "3", '{"step": 4}', "null", "", '{"kind": "a", "step": 2}']
    (tmp_path / "run/events.jsonl").write_text("\n".join(lines))
    run = um.open_run(tmp_path / "run")
    for _ in range(2):
        assert run.events()["kind"].tolist() == ["note", "a"]
    assert run.damaged == {"events.jsonl": "lines that hold no event: 4"}
    (message,) = caplog.messages
    assert "events.jsonl is damaged; reading what is left of it" in message


WRITER = """
import sys, time
from pathlib import Path
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink

directory = RunDirectory(Path(sys.argv[1]))
directory.start({"max_steps": 10000})
sink = StoreSink(directory)
for step in range(1, 10000):
    sink.write(StepRecord.of(step, time.time(), {"train/loss/total": 1 / step}))
    if step % 5 == 0:
        sink.write(Event(kind="alert", step=step, time=time.time(), data={"rule": "five"}))
    sink.flush()
    print(step, flush=True)
    time.sleep(0.005)
"""


def test_a_run_that_another_process_writes_is_followed_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        run = um.open_run(tmp_path / "run")
        seen = []
        for _ in range(5):
            while (written := int(writer.stdout.readline())) <= max(seen, default=0):
                pass  # was served already
            frame = run.metrics()
            assert frame.index.tolist() == list(range(1, len(frame) + 1))
            assert len(frame) >= written
            assert len(run.alerts()) >= written // 5
            assert run.info["status"] == "running"
            seen.append(len(frame))
        assert seen == sorted(set(seen))
        writer.kill()
    assert run.info["status"] == "crashed"
    assert len(run.metrics()) >= seen[-1]
