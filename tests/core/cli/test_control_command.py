"""`ulysses control`: the commands it sends, the answers it prints, and the input it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ulysses_monitor.records.command import Command
from ulysses_monitor.store import RunDirectory
from ulysses_monitor.store.control_file import CONTROL_FILE, ControlFile

Ulysses = Callable[..., tuple[int, str, str]]


class Training:
    """A run that does nothing but read its control file and answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.got: list[Command] = []
        self._directory = RunDirectory(path)
        self._directory.start({})
        self._events = path / "events.jsonl"
        self._thread: threading.Thread | None = None

    def tell(self, text: str) -> None:
        with self._events.open("a") as file:
            file.write(text)

    def answer(self, begin: str = "", end: bool = False, **answer: Any) -> None:
        """Answers the next command from another thread, after `begin`; nothing is no answer."""
        control = ControlFile(self.path)
        self._thread = threading.Thread(target=self._answer, args=(control, begin, end, answer))
        self._thread.start()

    def _answer(self, control: ControlFile, begin: str, end: bool, answer: dict[str, Any]) -> None:
        deadline = time.monotonic() + 20
        while (command := control.poll()) is None:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        self.got.append(command)
        event = {"kind": "control", "step": 120, "time": 1.0, "id": command.id, **answer}
        text = json.dumps(event) + "\n"
        self.tell(begin)
        if answer:
            self.tell(text[:30])
            time.sleep(0.3)  # half an answer is none yet
            self.tell(text[30:])
        if end:
            self.end()

    def end(self) -> None:
        self._directory.release()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self.end()


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "run")
    yield training
    training.close()


def test_the_answer_of_the_run_is_printed_on_one_line(ulysses: Ulysses, training: Training) -> None:
    training.answer(result="policies to shadow; saved")
    code, out, error = ulysses("control", "run", "policy=shadow", "save", "--why", "It jumps.")
    assert (code, out, error) == (0, "step 120: done: policies to shadow; saved\n", "")
    (got,) = training.got
    assert got.modes == {"*": "shadow"}
    assert (got.save, got.stop, got.why) == (True, False, "It jumps.")
    assert got.who
    assert abs(got.time - time.time()) < 60


def test_a_user_without_a_name_is_recorded_by_number(
    ulysses: Ulysses, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    training.answer(result="saved")
    assert ulysses("control", "run", "save")[0] == 0
    assert training.got[0].who == str(os.geteuid())


def test_a_command_that_the_run_refuses_is_wrong_input(
    ulysses: Ulysses, training: Training
) -> None:
    training.answer(refused="no policy 'clip' here")
    code, out, error = ulysses("control", "run", "policy.clip=off")
    assert (code, out) == (2, "")
    assert error == "ulysses: step 120: refused: no policy 'clip' here\n"


def test_answers_to_other_commands_are_ignored(ulysses: Ulysses, training: Training) -> None:
    training.tell('{"kind": "control", "step": 1, "id": "x", "result": "old"}\n{"kind": "al')
    others = ['ert"}', "junk", "[1]", '{"kind": "control", "step": 2, "id": "y", "result": "no"}']
    training.answer("\n".join(others) + "\n", result="yes")
    assert ulysses("control", "run", "save") == (0, "step 120: done: yes\n", "")


@pytest.mark.parametrize("key", ["result", "refused"])
def test_escape_codes_in_an_answer_are_replaced(
    ulysses: Ulysses, training: Training, key: str
) -> None:
    training.answer(**{key: "[red]a\x1b[2Jb\nc\x07"})
    _, out, error = ulysses("control", "run", "save")
    assert "[red]a\ufffd[2Jb\ufffdc\ufffd\n" in out + error
    assert (out + error).count("\n") == 1


def test_a_run_that_does_not_answer_in_time_applies_the_command_later(
    ulysses: Ulysses, training: Training
) -> None:
    code, out, error = ulysses("control", "run", "stop", "--wait", "0")
    assert (code, out) == (0, "")
    assert error == "run: sent; no answer yet, the run applies it at its next step\n"
    assert json.loads((training.path / CONTROL_FILE).read_text())["stop"] is True


def test_a_run_that_ends_without_an_answer_is_an_error(
    ulysses: Ulysses, training: Training
) -> None:
    training.answer(end=True)
    code, out, error = ulysses("control", "run", "save")
    assert (code, out) == (2, "")
    assert error == "ulysses: run run: it ended before it applied the command\n"


def test_an_answer_just_before_the_end_of_a_run_is_printed(
    ulysses: Ulysses, training: Training
) -> None:
    training.answer(end=True, result="stopping")
    assert ulysses("control", "run", "stop") == (0, "step 120: done: stopping\n", "")


def test_a_run_that_has_ended_is_refused_and_unchanged(
    ulysses: Ulysses, training: Training
) -> None:
    training.end()
    code, _, error = ulysses("control", "run", "save")
    assert (code, error.count("\n")) == (2, 1)
    assert "run run: it is not running" in error
    assert not (training.path / CONTROL_FILE).exists()


def test_a_folder_without_a_run_is_refused(ulysses: Ulysses, tmp_path: Path) -> None:
    for place in ("nowhere", "."):
        code, _, error = ulysses("control", place, "save")
        assert (code, error.count("\n")) == (2, 1)
        assert "no run.json in this folder; expected a run directory such as runs/sft" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_the_run_of_another_user_is_refused(ulysses: Ulysses, training: Training) -> None:
    os.chown(training.path / "run.json", 65534, -1)
    code, _, error = ulysses("control", "run", "save")
    assert code == 2
    assert "it belongs to user 65534" in error
    assert not (training.path / CONTROL_FILE).exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the command is empty"),
        (["polcy=off"], "did you mean 'policy'?"),
        (["policy=on"], "allowed: off, shadow, active"),
        (["lr_factor=11"], "expected 0 to 10"),
        (["save", "save"], "sets the same thing as an earlier word"),
        (["save", "--why", "x" * 501], "0 to 500 printable characters"),
        (["save", "--why", "a\x1b[2Jb"], "printable"),
        (["save", "--wait", "-1"], "--wait"),
    ],
)
def test_the_error_about_a_wrong_change_is_one_line_and_nothing_is_sent(
    ulysses: Ulysses, training: Training, words: list[str], expected: str
) -> None:
    code, out, error = ulysses("control", "run", *words)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert expected in error
    assert "\x1b" not in error
    assert not (training.path / CONTROL_FILE).exists()


def test_a_control_file_that_others_can_write_is_refused(
    ulysses: Ulysses, training: Training
) -> None:
    (training.path / CONTROL_FILE).touch()
    (training.path / CONTROL_FILE).chmod(0o666)
    code, _, error = ulysses("control", "run", "save")
    assert (code, error.count("\n")) == (2, 1)
    assert "is open to others (mode 666)" in error


def test_control_c_ends_the_wait_but_the_command_still_applies(training: Training) -> None:
    command = [sys.executable, "-m", "ulysses_core.cli", "control", str(training.path), "save"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: what a background job starts ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (training.path / CONTROL_FILE).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "")
    assert json.loads((training.path / CONTROL_FILE).read_text())["save"] is True
