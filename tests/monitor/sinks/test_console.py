from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from ulysses_monitor.records import Alert, Event, StepRecord
from ulysses_monitor.sinks import ConsoleSink
from ulysses_monitor.sinks.console import live

TRAINED = {
    "train/loss/total": 2.345,
    "grad/norm/total": 0.5,
    "train/tokens_per_second/total": 12345.6,
    "train/step_seconds/total": 2.0,
}


class FakeTerminal(io.StringIO):
    """A stream that claims to be a terminal, with an encoding as strict as a terminal's."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        text.encode(self._encoding)
        return super().write(text)


@pytest.fixture(autouse=True)
def redraws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_REDRAW_SECONDS", 0.0)


def on_terminal(terminal: FakeTerminal, width: int = 80, **options: object) -> ConsoleSink:
    console = Console(
        file=terminal,
        force_terminal=True,
        force_interactive=True,
        width=width,
        height=50,
        **options,  # type: ignore[arg-type]
    )
    return ConsoleSink(console)


def start(max_steps: int | None = 400, step: int = 0) -> Event:
    data = {"engine": "plain", "world_size": 1, "max_steps": max_steps}
    return Event(kind="start", step=step, time=0.0, data=data)


def stop(status: str = "finished") -> Event:
    return Event(kind="stop", step=0, time=0.0, data={"status": status})


def alert(message: str, severity: str = "warning", step: int = 7) -> Event:
    found = Alert(
        rule="spike",
        step=step,
        metric="a/a/a",
        value=1.0,
        threshold=0.0,
        message=message,
        hint="Look.",
        severity=severity,  # type: ignore[arg-type]
    )
    return found.to_event(0.0)


def last_frame(terminal: FakeTerminal) -> list[str]:
    """Returns what the terminal shows last, without control sequences."""
    shown = terminal.getvalue().rpartition("\x1b[2K")[2]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()


def test_without_a_terminal_progress_is_plain_lines() -> None:
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, width=40), every_seconds=1e6)
    sink.write(start(max_steps=3))
    for step in (1, 2, 3):
        sink.write(StepRecord.of(step, 0.0, TRAINED))
    sink.write(StepRecord.of(3, 0.0, {"eval/loss/total": 2.5}))
    sink.write(alert("It [bold]broke[/]."))
    sink.write(stop())
    sink.close()
    numbers = "loss 2.345  grad norm 0.5  tokens/s 12,346"
    assert file.getvalue().splitlines() == [
        "training: plain, 1 process",
        f"step 1/3  {numbers}",
        f"step 3/3  {numbers}",
        "step 3: held-out loss 2.5000",
        "alert spike: It [bold]broke[/]. Look.",
    ]


def test_without_a_terminal_the_last_step_is_printed_even_if_the_total_is_unknown() -> None:
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, width=40), every_seconds=1e6)
    sink.write(start(max_steps=None))
    for step in (1, 2, 3):
        sink.write(StepRecord.of(step, 0.0, TRAINED))
    sink.write(stop())
    lines = [line.split("  ")[0] for line in file.getvalue().splitlines()]
    assert lines == ["training: plain, 1 process", "step 1", "step 3"]


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_gets_plain_lines_whatever_the_environment_says_about_colour(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    sink = ConsoleSink()
    sink.write(start())
    sink.write(StepRecord.of(1, 0.0, TRAINED))
    sink.close()
    assert "\x1b[2K" not in file.getvalue()
    assert "step 1/400" in file.getvalue()


def test_the_table_shows_position_and_numbers_of_the_run() -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal, width=100)
    sink.write(start(max_steps=100))
    for step in range(1, 41):
        more = {"optim/lr/0": 1e-4, "optim/lr/1": 1e-4, "lora/grad_ratio_B_A/total": 1.5}
        more |= {"monitor/dropped_records/tensorboard": 3.0, "grad/clip_coef/total": 0.25}
        if step == 31:
            more["optim/update_ratio/total"] = 0.0012
        loss = {"train/loss/total": 5.0 - step / 20}
        sink.write(StepRecord.of(step, 0.0, TRAINED | loss | more))
    sink.write(StepRecord.of(40, 0.0, {"eval/loss/total": 3.25}))
    sink.close()
    shown = "\n".join(last_frame(terminal))
    assert re.search(r"step 40/100 +40%  2 min left", shown)
    assert re.search(r"loss +3\.000 +█\S*▁ falling", shown)
    assert re.search(r"gradient norm +0\.5 +\S+ flat", shown)
    assert re.search(r"learning rate +0\.0001\s", shown)
    assert re.search(r"held-out loss +3\.2500  step 40", shown)
    assert re.search(r"LoRA B/A gradient +1\.5", shown)
    assert re.search(r"clip coefficient +0\.25", shown)
    assert re.search(r"sampled at step 31\nupdate ratio +0\.0012", shown)
    assert "dropped records: tensorboard 3" in shown


def test_only_the_last_alerts_are_shown_but_all_are_counted() -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.write(start())
    for step in range(1, 8):
        sink.write(alert(f"Number {step}.", step=step))
    sink.close()
    shown = last_frame(terminal)
    assert shown[-4:] == [
        "7 alerts, the last 3:",
        *(f"step {n} spike: Number {n}. Look." for n in (5, 6, 7)),
    ]


def test_text_from_a_run_is_neither_markup_nor_control_sequence() -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.write(start())
    sink.write(alert("[red]x[/red] [/] \x1b[2J\nnext"))
    sink.close()
    assert "\x1b[2J" not in terminal.getvalue()
    assert "step 7 spike: [red]x[/red] [/]  [2J next Look." in last_frame(terminal)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [10, 40, 80, 400])
def test_the_table_fits_every_width_and_encoding(width: int, encoding: str) -> None:
    terminal = FakeTerminal(encoding)
    sink = on_terminal(terminal, width=width)
    sink.write(start())
    for step in range(1, 60):
        sink.write(StepRecord.of(step, 0.0, TRAINED | {"optim/update_ratio/total": 1e-3}))
    sink.write(alert("A → B, in 層 " + 30 * "long "))
    sink.close()
    shown = last_frame(terminal)
    assert max(map(len, shown)) <= min(width, 120)
    assert any(line.startswith("step 59") for line in shown)
    assert any(line.startswith("gradient") for line in shown)


def test_no_color_turns_colours_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.write(start())
    sink.write(StepRecord.of(100, 0.0, TRAINED))
    sink.write(alert("Bad.", "critical"))
    sink.close()
    codes = {
        code
        for codes in re.findall(r"\x1b\[([0-9;]+)m", terminal.getvalue())
        for code in codes.split(";")
    }
    assert codes <= {"0", "1", "2"}
    assert "━" * 20 + "─" * 60 in last_frame(terminal)


def test_nan_and_inf_are_shown() -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.write(start())
    broken = {"train/loss/total": float("nan"), "grad/norm/total": float("inf")}
    sink.write(StepRecord.of(1, 0.0, TRAINED))
    sink.write(StepRecord.of(2, 0.0, TRAINED | broken))
    sink.close()
    shown = last_frame(terminal)
    assert [line.split()[-1] for line in shown if line.startswith("loss")] == ["nan"]
    assert [line.split()[-1] for line in shown if line.startswith("gradient norm")] == ["inf"]


def test_nan_among_the_last_steps_leaves_holes_and_no_calm_word() -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal, width=100)
    sink.write(start(max_steps=40))
    for step in range(1, 41):
        values = {"train/loss/total": 1.0 / step, "grad/norm/total": 1.0, "grad/nonfinite/total": 0}
        broken = {"train/loss/total": float("nan"), "grad/norm/total": 0, "grad/nonfinite/total": 9}
        sink.write(StepRecord.of(step, 0.0, TRAINED | (broken if step == 30 else values)))
    sink.close()
    for label in ("loss", "gradient norm"):
        (line,) = [line for line in last_frame(terminal) if line.startswith(label)]
        assert line.endswith("not finite")
        assert line.count("!") == 1
    assert "nan" not in "".join(last_frame(terminal))


def test_a_norm_that_left_out_every_element_is_nan_and_the_bar_is_red() -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.write(start(max_steps=1))
    sink.write(StepRecord.of(1, 0.0, TRAINED | {"grad/norm/total": 0, "grad/nonfinite/total": 9}))
    sink.close()
    (line,) = [line for line in last_frame(terminal) if line.startswith("gradient norm")]
    assert line.split()[-1] == "nan"
    assert "\x1b[31m━" in terminal.getvalue()
    file = io.StringIO()
    sink = ConsoleSink(Console(file=file, width=80))
    sink.write(StepRecord.of(1, 0.0, TRAINED | {"grad/norm/total": 0, "grad/nonfinite/total": 9}))
    assert "grad norm nan" in file.getvalue()


def test_the_table_has_the_name_of_the_run(tmp_path: Path) -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.open(tmp_path / "sft", {})
    sink.write(start())
    sink.close()
    assert last_frame(terminal)[0] == "sft: plain, 1 process"


def test_a_resumed_run_continues_from_its_step() -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.write(start(step=200))
    sink.close()
    assert last_frame(terminal)[1].startswith("step 200/400")


def test_the_last_table_stays_and_shows_how_the_run_ended() -> None:
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.write(start())
    sink.write(StepRecord.of(3, 0.0, TRAINED))
    sink.write(stop("stopped"))
    assert last_frame(terminal)[1].endswith("stopped")
    sink.write(start())  # another training in the same process
    sink.write(stop("finished"))
    assert last_frame(terminal)[1].endswith("finished")


say = print


def standard_streams(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    """Makes standard output and error one terminal; called in the test, under its capture."""
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_prints_go_above_the_table_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_streams(monkeypatch)
    sink = on_terminal(terminal)
    sink.write(start())
    say("[bold]one[/bold]")
    say("[/] two", end="", flush=True)
    say(" halves")
    say("10%\r20%\r100%", file=sys.stderr)
    sink.close()
    assert terminal.getvalue().count("training: plain") >= 4
    for line in ("[bold]one[/bold]\n", "[/] two halves\n", "100%\n"):
        assert line in terminal.getvalue()
    assert "10%" not in terminal.getvalue().replace("100%", "")


def test_closing_restores_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_streams(monkeypatch)
    sink = on_terminal(terminal)
    sink.write(start())
    assert sys.stdout is not terminal
    say("unfinished", end="")
    sink.close()
    sink.close()
    assert sys.stdout is sys.stderr is terminal
    assert terminal.getvalue().endswith("unfinished\n")


def test_the_streams_are_restored_even_if_the_last_drawing_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = standard_streams(monkeypatch)
    sink = on_terminal(terminal)
    sink.write(start())
    monkeypatch.setattr(terminal, "write", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sink.close()
    assert sys.stdout is terminal


def test_a_stream_that_was_replaced_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_streams(monkeypatch)
    sink = on_terminal(terminal)
    sink.write(start())
    theirs = io.StringIO()
    with contextlib.redirect_stdout(theirs):
        sink.close()
        assert sys.stdout is theirs
    say("later")  # into the sink's stream, which was put back
    assert "later\n" in terminal.getvalue()


def test_output_that_goes_to_a_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_streams(monkeypatch)
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    sink = on_terminal(terminal)
    sink.write(start())
    say("for the file")
    sink.close()
    assert log.getvalue() == "for the file\n"


def test_logging_handlers_write_above_the_table_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_streams(monkeypatch)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("tests.console")
    logger.addHandler(handler)
    sink = on_terminal(terminal)
    try:
        sink.write(start())
        assert handler.stream is not terminal
        logger.warning("a [warning]")
        sink.close()
    finally:
        logger.removeHandler(handler)
    assert handler.stream is terminal
    assert "a [warning]\n" in terminal.getvalue()


PROGRAM = """
import sys, time
from ulysses_monitor.records import Event
from ulysses_monitor.sinks import ConsoleSink
sink = ConsoleSink()
data = {"engine": "plain", "world_size": 1, "max_steps": 9}
sink.write(Event(kind="start", step=0, time=0.0, data=data))
print("printed")
"""


@pytest.mark.parametrize(
    "ending", ["", "raise KeyboardInterrupt", "sys.exit(3)", "raise ValueError('broken')"]
)
def test_a_program_that_never_closes_the_sink_leaves_the_terminal_intact(ending: str) -> None:
    leader, follower = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    program = [sys.executable, "-c", PROGRAM + ending]
    process = subprocess.Popen(program, stdin=follower, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    output = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        output += chunk
    process.wait(timeout=60)
    os.close(leader)
    assert b"printed" in output
    assert output.rfind(b"\x1b[?25h") > output.rfind(b"\x1b[?25l")
    assert b"Exception ignored" not in output


def test_the_table_is_drawn_rarely_however_short_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_REDRAW_SECONDS", 0.5)
    terminal = FakeTerminal()
    sink = on_terminal(terminal)
    sink.write(start())
    began = time.monotonic()
    for step in range(1, 300):
        sink.write(StepRecord.of(step, 0.0, TRAINED))
        sink.flush()
    draws = terminal.getvalue().count("training: plain")
    assert draws <= 3 + (time.monotonic() - began) / 0.5
    sink.close()
    assert last_frame(terminal)[1].startswith("step 299")
