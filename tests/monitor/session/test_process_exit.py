"""However a process goes, its run is closed and says how it ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import ulysses_monitor as um
from tests.support.commands import run_python

LOOP = """
import os, signal, sys, time
import torch
import ulysses_monitor as um

{before}
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
monitor = um.Monitor(sys.argv[1], tensorboard=False)

def train(steps):
    for step in range(steps):
        loss = model(torch.ones(3, 4)).sum()
        loss.backward()
        monitor.observe(loss=loss)
        optimizer.step()
        optimizer.zero_grad()

{body}
"""

WAITS = """
with monitor.watch(model, optimizer):
    train(5)
    print("ready", flush=True)
    time.sleep(60)
"""

STARTED = """
from ulysses_monitor.engines import find_engine
from ulysses_monitor.session.opening import Training

session = monitor.open(find_engine(model, optimizer), Training())
session.hook_step(session.step_ends)
train(5)
print("ready", flush=True)
time.sleep(60)
"""
"""As a Trainer's callback has it: nobody sees the training end."""


def script(body: str, before: str = "") -> str:
    return LOOP.format(before=textwrap.dedent(before), body=textwrap.dedent(body))


def start(run: Path, body: str, before: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script(body, before), str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    return child.returncode, out, err


def signalled(run: Path, body: str, number: signal.Signals, before: str = "") -> int:
    child = start(run, body, before)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    began = time.monotonic()
    child.send_signal(number)
    code, _, _ = end(child)
    assert time.monotonic() - began < 50  # it sleeps for 60
    return code


def assert_recorded(run: Path, status: str) -> None:
    reader = um.open_run(run)
    assert reader.info["status"] == status
    assert reader.metrics("train/loss/total").index.tolist() == [1, 2, 3, 4, 5]
    assert reader.events("stop")["status"].tolist() == [status]


@pytest.mark.parametrize("body", [WAITS, STARTED])
def test_sigterm_writes_everything_and_the_process_still_dies_of_it(
    tmp_path: Path, body: str
) -> None:
    assert signalled(tmp_path / "run", body, signal.SIGTERM) == -signal.SIGTERM
    assert_recorded(tmp_path / "run", "stopped")


OTHERS = """
def other(name):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = um.Monitor(sys.argv[1] + "-" + name, tensorboard=False)
    return monitor.open(find_engine(model, optimizer), Training())
"""


def test_sigterm_ends_every_open_run_whatever_was_closed_before(tmp_path: Path) -> None:
    trains, ready = STARTED.split('print("ready"')
    body = f"""{trains}{OTHERS}
closed, left_open = other("closed"), other("open")
closed.close()  # its handler is not the last one
print("ready"{ready}"""
    run = tmp_path / "run"
    assert signalled(run, body, signal.SIGTERM) == -signal.SIGTERM
    assert_recorded(run, "stopped")
    assert um.open_run(f"{run}-open").info["status"] == "stopped"
    assert um.open_run(f"{run}-closed").info["status"] == "finished"


def test_the_users_own_handler_is_reached_through_several_runs(tmp_path: Path) -> None:
    trains, ready = STARTED.split('print("ready"')
    body = f"""{trains}{OTHERS}
left_open = other("open")
print("ready"{ready}"""
    before = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    run = tmp_path / "run"
    assert signalled(run, body, signal.SIGTERM, before) == 7
    assert_recorded(run, "stopped")
    assert um.open_run(f"{run}-open").info["status"] == "stopped"


def test_the_users_own_handler_decides_and_the_exit_closes_the_run(tmp_path: Path) -> None:
    before = """
    def mine(number, frame):
        import json
        print(json.load(open(sys.argv[1] + "/run.json"))["status"], flush=True)
        sys.exit(7)
    signal.signal(signal.SIGTERM, mine)
    """
    child = start(tmp_path / "run", WAITS, before)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    code, out, _ = end(child)
    assert (code, out) == (7, "running\n")
    assert_recorded(tmp_path / "run", "stopped")


def test_a_training_whose_handler_lets_it_continue_is_watched_to_its_end(tmp_path: Path) -> None:
    body = """
    with monitor.watch(model, optimizer):
        train(2)
        print("ready", flush=True)
        while not asked:
            time.sleep(0.01)
        train(3)
    """
    before = """
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    """
    assert signalled(tmp_path / "run", body, signal.SIGTERM, before) == 0
    assert_recorded(tmp_path / "run", "finished")


def test_a_second_sigterm_does_not_cut_the_closing_short(tmp_path: Path) -> None:
    before = """
    class Slow:
        def write(self, item): ...
        def flush(self): ...
        def close(self):
            print("closing", flush=True)
            time.sleep(1.5)
    """
    body = WAITS.replace("with monitor", "monitor._parts.sinks.append(Slow())\nwith monitor")
    child = start(tmp_path / "run", body, before)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "closing\n"
    child.send_signal(signal.SIGTERM)
    code, _, _ = end(child)
    assert code == -signal.SIGTERM
    assert_recorded(tmp_path / "run", "stopped")
    assert [p.name for p in (tmp_path / "run/metrics").iterdir()] == ["metrics.parquet"]


def test_a_training_that_ignores_sigterm_continues(tmp_path: Path) -> None:
    body = WAITS.replace("time.sleep(60)", "time.sleep(1)")
    before = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    assert signalled(tmp_path / "run", body, signal.SIGTERM, before) == 0
    assert_recorded(tmp_path / "run", "finished")


def test_ctrl_c_stops_a_run_and_does_not_fail_it(tmp_path: Path) -> None:
    # Where tabulate is installed, torch imports it at exit, and its `eval` makes Python forget that
    # the program was interrupted: then the exit code is 1, watched or not.
    before = """
        import sys
        sys.modules["tabulate"] = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
    """
    code = signalled(tmp_path / "run", WAITS, signal.SIGINT, before)
    assert code == -signal.SIGINT
    assert_recorded(tmp_path / "run", "stopped")


TRAINER = """
import sys, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
import ulysses_monitor as um

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def forward(self, x):
        return {"loss": self.layer(x).mean()}

class Ends(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            HOW

trainer = Trainer(
    Model(),
    TrainingArguments(sys.argv[1] + "-out", max_steps=50, use_cpu=True, report_to="none",
                      save_strategy="no", disable_tqdm=True),
    train_dataset=[{"x": torch.ones(4)}] * 64,
)
um.Monitor(sys.argv[1], tensorboard=False).attach(trainer)
trainer.add_callback(Ends())
trainer.train()
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("raise KeyboardInterrupt", "stopped"),
        ("raise RuntimeError", "failed"),
        ("sys.exit(3)", "failed"),
    ],
)
def test_a_trainer_that_ends_early_records_its_status(
    tmp_path: Path, how: str, status: str
) -> None:
    child = run_python("-c", TRAINER.replace("HOW", how), str(tmp_path / "run"), folder=tmp_path)
    assert child.returncode != 0
    assert_recorded(tmp_path / "run", status)


def test_a_forked_worker_that_is_terminated_or_exits_leaves_the_run_alone(tmp_path: Path) -> None:
    body = """
    with monitor.watch(model, optimizer):
        train(2)
        ends = []
        for how in ("exit", "term"):
            child = os.fork()
            if child == 0:
                if how == "exit":
                    sys.exit(0)  # runs what is registered for the exit
                time.sleep(30)
            time.sleep(0.2)
            if how == "term":
                os.kill(child, signal.SIGTERM)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        train(3)
    print(ends, flush=True)
    """
    child = run_python("-c", script(body), str(tmp_path / "run"), folder=tmp_path)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "[0, -15]\n"
    assert_recorded(tmp_path / "run", "finished")


def test_after_a_run_the_signal_handler_is_restored(tmp_path: Path) -> None:
    body = """
    before = signal.getsignal(signal.SIGTERM)
    with monitor.watch(model, optimizer):
        assert signal.getsignal(signal.SIGTERM) is not before
        train(5)
    assert signal.getsignal(signal.SIGTERM) is before
    print("same", flush=True)
    """
    child = run_python("-c", script(body), str(tmp_path / "run"), folder=tmp_path)
    assert (child.returncode, child.stdout) == (0, "same\n"), child.stderr


def test_a_run_in_another_thread_works_without_the_signal(tmp_path: Path) -> None:
    body = """
    import threading
    def work():
        with monitor.watch(model, optimizer):
            train(5)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    """
    child = run_python("-c", script(body), str(tmp_path / "run"), folder=tmp_path)
    assert child.returncode == 0, child.stderr
    assert_recorded(tmp_path / "run", "finished")
