"""Whatever is damaged in a run, each command says so in a line, shows the rest, and goes on.

A damage that leaves something to show is named on standard error, and the exit code is 0. One that
leaves nothing, or no run, is wrong input: one line, exit code 2.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ulysses_monitor as um
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.report import write_report
from ulysses_monitor.store import RunDirectory, StoreSink

Ulysses = Callable[..., tuple[int, str, str]]
Damage = Callable[[Path], None]

SCHEMA = Schema(("train/loss/total", "grad/norm/total", "train/step_seconds/total"))
RUN = "runs/one"


def record(path: Path) -> None:
    """Writes a run of 25 steps: two parts and a tail."""
    directory = RunDirectory(path)
    directory.start({"engine": "plain", "world_size": 1, "max_steps": 25})
    sink = StoreSink(directory, part_rows=10)
    sink.write(Event(kind="start", step=0, time=1e9))
    for step in range(1, 26):
        sink.write(StepRecord(step, 1e9 + step, SCHEMA, np.array([1.0, 2.0, 0.5])))
    sink.flush()
    directory.finish("finished")
    (path / "tensorboard").mkdir()


def change_info(**changes: object) -> Damage:
    def damage(run: Path) -> None:
        info = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(info | changes))

    return damage


def write_info(content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda run: void((run / "run.json").write_bytes(data))


def change_file(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(run: Path) -> None:
        file = next(run.glob(name))
        file.write_bytes(change(file.read_bytes()))

    return damage


def replace_by_folder(name: str) -> Damage:
    def damage(run: Path) -> None:
        file = next(run.glob(name))
        file.unlink()
        file.mkdir()

    return damage


def replace_by_file(name: str) -> Damage:
    def damage(run: Path) -> None:
        shutil.rmtree(run / name)
        (run / name).write_text("not a folder")

    return damage


def make_unreadable(name: str) -> Damage:
    """Makes a file that fails to open, also for root, for whom permissions do not count."""

    def damage(run: Path) -> None:
        file = next(run.glob(name))
        file.unlink()
        file.symlink_to(file.name)

    return damage


def void(_: object) -> None:
    """Makes an expression a statement."""


def flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 0x55]) * 64 + data[at + 64 :]


def flip_end(data: bytes) -> bytes:
    """Damages values, which only their checksum tells."""
    at = data.index(np.float32(2.0).tobytes() * 10)
    return data[:at] + b"\x01" + data[at + 1 :]


PART, EVENTS = "metrics/part-00000-*", "events.jsonl"
ODD_EVENTS = b"""{"kind": [], "step": "x", "time": {}}
{"kind": "alert", "step": NaN, "time": "y"}
{"kind": "start", "step": 1e400, "time": []}
"""
DEEP = b"[" * 200_000 + b"\n"
LEAVES_SOME: dict[str, tuple[Damage, str]] = {
    "a corrupt part": (change_file(PART, flip), "metrics/part-00000-"),
    "a part in which values are flipped": (change_file(PART, flip_end), "part-00000-"),
    "a truncated part": (change_file(PART, lambda data: data[: len(data) // 3]), "part-00000-"),
    "an empty part": (change_file(PART, lambda _: b""), "part-00000-"),
    "a part that is a folder": (replace_by_folder(PART), "part-00000-"),
    "a part that may not be read": (make_unreadable(PART), "part-00000-"),
    "a corrupt tail": (change_file("metrics/_tail*", flip), "metrics/_tail-"),
    "a tail of zeros and text": (change_file("metrics/_tail*", lambda _: b"x" * 4096), "_tail-"),
    "a missing folder of metrics": (lambda run: shutil.rmtree(run / "metrics"), "metrics"),
    "metrics that are a file": (replace_by_file("metrics"), "metrics"),
    "broken events": (change_file(EVENTS, lambda data: b'{"kind": "sta\n[]\n' + data), EVENTS),
    "events that are not UTF-8": (
        change_file(EVENTS, lambda data: b"\xff\xfe\x00\n" + data),
        EVENTS,
    ),
    "events nested too deep": (change_file(EVENTS, lambda data: DEEP + data), EVENTS),
    "events of odd types": (
        change_file(EVENTS, lambda data: ODD_EVENTS + data),
        EVENTS,
    ),
    "events nested deep": (
        change_file(
            EVENTS, lambda data: b'{"kind": "a", "x": %s}\n' % (b"[" * 400 + b"]" * 400) + data
        ),
        EVENTS,
    ),
    "events in a folder": (replace_by_folder(EVENTS), EVENTS),
    "events that may not be read": (make_unreadable(EVENTS), EVENTS),
    "a run.json with nothing in it": (write_info("{}"), "run.json"),
    "a run.json of wrong types": (
        change_info(
            name=[1],
            status={"a": 1},
            starts=7,
            max_steps="many",
            world_size=[],
            engine=3,
            model="x",
            config=[1],
            versions=[],
            ended="soon",
        ),
        "run.json",
    ),
    "a run.json with NaN": (
        change_info(
            starts=[float("nan"), float("inf")],
            ended=float("nan"),
            max_steps=float("nan"),
            world_size=float("inf"),
            model={"parameters": float("nan"), "trainable_parameters": float("inf")},
        ),
        "run.json",
    ),
    "a run.json with odd starts": (
        change_info(starts=["a", None, {}], ended=1e300, max_steps=-1, world_size=10**400),
        "run.json",
    ),
}
DEEP_INFO = '{"config": ' + '{"a": ' * 400 + "1" + "}" * 401
LEAVES_NONE: dict[str, Damage] = {
    "run.json cut off": change_file("run.json", lambda data: data[:20]),
    "an empty run.json": write_info(""),
    "a run.json with a list": write_info("[]"),
    "a run.json with a number": write_info("NaN"),
    "a run.json that is not UTF-8": write_info(b"\xff\xfe\x00{"),
    "a run.json nested too deep": write_info("[" * 200_000),
    "a run.json nested deep": write_info(DEEP_INFO),
    "a run.json nested too deep in objects": write_info('{"a":' * 200_000),
    "a run.json with a huge number": write_info('{"max_steps": ' + "9" * 5000 + "}"),
    "a run.json that is a folder": replace_by_folder("run.json"),
    "a run.json that may not be read": make_unreadable("run.json"),
    "a run that is missing": lambda run: shutil.rmtree(run),
    "a run that is a file": lambda run: (shutil.rmtree(run), run.write_text("x")),
    "an empty folder": lambda run: (shutil.rmtree(run), run.mkdir()),
}
READING = {
    "report": ["report", RUN],
    "replay": ["replay", RUN],
    "replay --json": ["replay", RUN, "--json"],
    "replay --policies": ["replay", RUN, "--policies", "adaptive"],
    "watch": ["watch", RUN],
    "runs": ["runs", "runs"],
    "runs --json": ["runs", "runs", "--json"],
    "store compact": ["store", "compact", RUN],
    "board": ["board", RUN],
    "control": ["control", RUN, "stop", "--wait", "0"],
}
NOT_READ_BY_BOARD = ("a corrupt part", "a part in which values are flipped")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record(tmp_path / RUN)
    return tmp_path / RUN


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`ulysses board` ends as by Ctrl-C, once it would serve, and leaves no signal handler."""

    def launch(folder: str, port: int | None) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("ulysses_core.cli.board._launch", launch)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("damage", LEAVES_SOME)
def test_each_command_names_what_is_damaged_and_shows_the_rest(
    ulysses: Ulysses, run: Path, tmp_path: Path, damage: str
) -> None:
    make, name = LEAVES_SOME[damage]
    make(run)
    for command, arguments in READING.items():
        shutil.rmtree(tmp_path / "runs")
        record(run)
        make(run)
        code, out, error = ulysses(*arguments)
        assert len(error.splitlines()) <= 2, (command, error)
        if command == "control":  # it reads neither metrics nor events of a run that has ended
            assert (code, error.count("\n")) == (2, 1)
        elif command == "store compact" and code == 2:  # nothing is left that it could merge
            assert name in error
        elif command == "board" and damage in NOT_READ_BY_BOARD:
            assert code == 0
        else:
            assert code == 0, (command, error)
            assert name in (out if "json" in command else error), (command, out, error)


@pytest.mark.parametrize("damage", LEAVES_SOME)
def test_many_runs_at_once_and_the_page_name_it_too(
    run: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, name = LEAVES_SOME[damage]
    make(run)
    runs = um.open_runs(run.parent)
    for read in (runs.table, runs.metrics, runs.dataset, lambda: runs.sql("from metrics")):
        read()
        if read == runs.table or ("run.json" not in name and "events" not in name):
            assert name in runs.problems.get(str(run), ""), read
    html = write_report(um.open_run(run)).read_text(encoding="utf-8")
    head, _, _ = html.partition("<h2")
    assert name in head
    assert "is damaged" in head


@pytest.mark.parametrize("damage", LEAVES_NONE)
def test_each_command_says_in_one_line_that_there_is_no_run_to_read(
    ulysses: Ulysses, run: Path, tmp_path: Path, damage: str
) -> None:
    for command, arguments in READING.items():
        shutil.rmtree(tmp_path / "runs")
        record(run)
        LEAVES_NONE[damage](run)
        code, out, error = ulysses(*arguments)
        if command in ("runs", "runs --json"):
            assert code == 0
            if (run / "run.json").exists():
                assert "run.json" in (out if "json" in command else error)
        elif command == "board" and (run / "tensorboard").is_dir():
            assert code == 0
            assert "run.json" in error
        else:
            assert code == 2, (command, error)
            assert error.startswith("ulysses: ")
        assert error.count("\n") <= 1, (command, error)


def test_control_waits_for_a_live_run_whose_events_are_damaged(ulysses: Ulysses, run: Path) -> None:
    replace_by_folder(EVENTS)(run)
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, error = ulysses(*READING["control"])
    assert code == 0
    assert "no answer yet" in error


def test_entries_that_are_what_they_should_be_stay(run: Path) -> None:
    change_info(max_steps=float("nan"), world_size=8)(run)
    found = um.open_run(run)
    assert found.info["world_size"] == 8
    assert "max_steps" not in found.info
    assert found.damaged == {"run.json": "max_steps is NaN"}
    change_info(max_steps=25)(run)
    assert found.info["max_steps"] == 25
    assert found.damaged == {}


def test_odd_events_are_left_out_and_the_others_are_kept(run: Path) -> None:
    LEAVES_SOME["events of odd types"][0](run)
    found = um.open_run(run)
    assert [event["kind"] for event in found.event_list()] == ["start"]
    assert found.damaged == {EVENTS: "lines that hold no event: 3"}
