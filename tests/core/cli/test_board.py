from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ulysses_core.cli.board import find_runs
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import StepRecord
from ulysses_monitor.sinks import TensorBoardSink

COMMAND = [sys.executable, "-m", "ulysses_core.cli", "board"]


def make_run(path: Path) -> Path:
    sink = TensorBoardSink(path / "tensorboard")
    sink.write(StepRecord.of(1, 0.0, {"train/loss/total": 1.5}))
    sink.close()
    return path


def test_runs_have_the_names_of_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("pt", "sft")]
    assert find_runs(runs) == {"pt": runs[0], "sft": runs[1]}


def test_runs_with_the_same_name_get_the_names_of_parent_folders_too(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a/sft", "b/sft")]
    assert list(find_runs(runs)) == ["a/sft", "b/sft"]


def test_a_folder_of_runs_gives_each_run_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    (tmp_path / "notes").mkdir()
    assert list(find_runs([runs[1], tmp_path]).values()) == [runs[1], runs[0]]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing", "no such folder"),
        ("empty", "no run in this folder"),
        ("plain", "tensorboard=false"),
    ],
)
def test_the_error_about_a_wrong_path_says_what_is_missing(
    tmp_path: Path, path: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/run.json").write_text("{}")
    with pytest.raises(InputError, match=f"{path}: .*{words}"):
        find_runs([tmp_path / path])


def test_the_command_exits_with_2_after_wrong_input(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "nothing"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ulysses: run nothing: no such folder")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    make_run(tmp_path / "runs/sft")
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        [*COMMAND, "runs/sft", "--port", "0"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Where these tests run in the background, a shell has made all of them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"TensorBoard of 1 run: (http://127\.0\.0\.1:\d+/)", line)
    assert found is not None, line + process.stdout.read()
    yield process, found[1]
    process.kill()
    process.wait()


def scalars(url: str) -> dict[str, dict[str, object]]:
    with urllib.request.urlopen(f"{url}data/plugin/scalars/tags", timeout=30) as answer:  # noqa: S310 - of this machine
        found: dict[str, dict[str, object]] = json.load(answer)
        return found


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_tensorboard_serves_the_runs_until_it_is_interrupted(
    server: tuple[subprocess.Popen[str], str], tmp_path: Path, sent: signal.Signals
) -> None:
    process, url = server
    deadline = time.monotonic() + 30
    while not (found := scalars(url)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(found) == ["sft"]
    assert list(found["sft"]) == ["train/loss/total"]
    process.send_signal(sent)
    assert process.wait(timeout=30) == (0 if sent == signal.SIGINT else 143)
    assert process.stdout is not None
    assert process.stdout.read().strip() == ""
    assert not [p for p in (tmp_path / "tmp").iterdir() if p.name.startswith("ulysses-board")]


def test_a_port_that_is_taken_is_wrong_input(
    server: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    port = server[1].rstrip("/").rpartition(":")[2]
    done = subprocess.run(
        [*COMMAND, "runs", "--port", port],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
