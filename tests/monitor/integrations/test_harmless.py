"""A watched training differs from an unwatched one in nothing but what the monitor records.

`tests.support.footprint` notes weights, checkpoints, logs, hooks, attributes, the state of the
process and what is kept alive, in an interpreter of its own for each way of watching.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import ulysses_monitor as um

TRAININGS = ("hf", "lora", "sft", "loop")
PYTHON = (sys.executable, "-m")
COMMANDS = {
    "bare": (*PYTHON, "tests.support.footprint", "bare"),
    "monitor": (*PYTHON, "tests.support.footprint", "monitor"),
    "attach": (
        *(*PYTHON, "ulysses_core.cli", "attach", "--run-dir", "recorded/run0", "--"),
        *(*PYTHON, "tests.support.footprint", "bare"),
    ),
}
OURS = {
    # Processes that the training starts are attached too.
    "environment/PYTHONPATH",
    "environment/ULYSSES_ATTACH",
    "environment/ULYSSES_ATTACH_NOTES",
}
CALLBACKS = re.compile(r"(, )?'(Monitor|Attached)Callback'")
TIMES = re.compile(r"'\w*(runtime|per_second)': '\S+'|^\[\S+ \S+\]", re.MULTILINE)

Noted = dict[str, dict[str, Any]]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trains in every way, all at once."""
    settings = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, **settings, "PYTHONPATH": path}
    folders = {how: tmp_path_factory.mktemp(how) for how in COMMANDS}
    running = []
    for how, command in COMMANDS.items():
        out, err = (open(folders[how] / name, "w") for name in ("out", "err"))  # noqa: PTH123, SIM115
        with out, err:
            running.append(
                subprocess.Popen(
                    command,
                    cwd=folders[how],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                )
            )
    try:
        for process, folder in zip(running, folders.values(), strict=True):
            assert process.wait(300) == 0, (folder / "err").read_text()[-3000:]
    finally:
        for process in running:
            process.kill()
    return folders


def noted(folder: Path) -> Noted:
    text = (folder / "facts.json").read_text().replace(str(folder), ".")
    facts: Noted = json.loads(CALLBACKS.sub("", text))
    return facts


def differences(bare: Any, watched: Any, path: str = "") -> Iterator[str]:
    if isinstance(bare, Mapping) and isinstance(watched, Mapping):
        for key in bare | watched:
            place = f"{path}/{key}".lstrip("/")
            yield from differences(bare.get(key), watched.get(key), place)
    elif bare != watched:
        yield f"{path}: {bare!r} became {watched!r}"


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("how", ["monitor", "attach"])
def test_nothing_differs(folders: dict[str, Path], how: str, training: str) -> None:
    bare, watched = noted(folders["bare"])[training], noted(folders[how])[training]
    found = [d for d in differences(bare, watched) if d.split(": ")[0] not in OURS]
    assert not found


@pytest.mark.parametrize("how", ["monitor", "attach"])
def test_the_script_prints_the_same(folders: dict[str, Path], how: str) -> None:
    bare, watched = (TIMES.sub("", (folders[h] / "out").read_text()) for h in ("bare", how))
    assert watched == bare


def test_each_training_was_really_watched(folders: dict[str, Path]) -> None:
    for place in ("run0", "run1", "run2", "run3"):
        run = um.open_run(folders["monitor"] / "recorded" / place)
        assert list(run.metrics("grad/norm/total").index) == [1, 2, 3, 4]
    for place in ("run0", "run0-2", "run0-3"):
        run = um.open_run(folders["attach"] / "recorded" / place)
        assert list(run.metrics("grad/norm/total").index) == [1, 2, 3, 4]


def test_what_is_compared_is_there(folders: dict[str, Path]) -> None:
    facts = noted(folders["bare"])
    assert tuple(facts) == TRAININGS
    for training in TRAININGS[:3]:
        names = {Path(name).name for name in facts[training]["files"]}
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
        assert len(facts[training]["log"]) > 4
        assert facts[training]["alive"] == []
