"""Runs a case without and with the monitor, and compares what the two leave behind."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import ulysses_monitor as um
from tests.clients.case import RUN, Case, Outcome, write_files
from tests.clients.environments import Environment

__all__ = ["BOUND", "Ran", "compare_norms", "compare_weights", "differing_lines", "run_case"]

BOUND = 1e-6
"""Largest relative difference between the monitor's and the framework's gradient norm."""

_LONGEST_SECONDS = 900
_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "DISABLE_VERSION_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MASTER_ADDR": "127.0.0.1",
}
_OURS = re.compile(r"ulysses: |\bmonitor: ")
_PROGRESS = re.compile(r"\d+%\||\d+(\.\d+)? ?(it|s|examples|samples|B|MB)/(s|it)|^\s*$")
_TIMES = re.compile(
    r"'?\w*(runtime|per_second|time|speed|elapsed|memory)\w*(\([\w/]+\))?'?\s*[:=]\s*'?[\d.:e+-]+\w*(/s)?'?"
    r"|\d{2,4}[-/]\d\d[-/]\d\d[ T]|\d+:\d\d(:\d\d)?([.,]\d+)?|\bpid[ =:]*\d+|0x[0-9a-f]+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Ran:
    """One run of a command that succeeded."""

    folder: Path
    outcome: Outcome
    seconds: float
    stdout: str
    stderr: str


def run_case(case: Case, environment: Environment, folder: Path) -> tuple[Ran, Ran]:
    """Runs a case without and with the monitor."""
    if case.client.has_transformers:
        shutil.copytree(environment.models, folder, dirs_exist_ok=True)
    return (
        _run(case, list(case.command), environment, folder / "plain"),
        _run(case, case.watched_command(), environment, folder / "watched"),
    )


def _run(case: Case, command: list[str], environment: Environment, folder: Path) -> Ran:
    folder.mkdir()
    write_files(case.files, folder)
    variables = {**environment.variables(), **_VARIABLES, "HF_HOME": str(folder / ".hf")}
    program = shutil.which(command[0], path=variables["PATH"])
    assert program is not None, f"{case.client.package} has no command {command[0]}"
    begin = time.perf_counter()
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env={**variables, **case.environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LONGEST_SECONDS,
    )
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    )
    return Ran(folder, case.read(folder), seconds, done.stdout, done.stderr)


def compare_weights(case: Case, plain: Ran, watched: Ran) -> bool:
    """Whether both runs left the same files with weights, equal bit for bit."""
    left, right = (_weights(case, ran.folder) for ran in (plain, watched))
    return bool(left) and left == right


def _weights(case: Case, folder: Path) -> dict[str, bytes]:
    files = {file for pattern in case.weights for file in folder.glob(pattern)}
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return {name: content for name, content in found.items() if not name.startswith(f"{RUN}/")}


def compare_norms(watched: Ran) -> float:
    """Returns the largest relative difference between the framework's norms and ours.

    Infinite if the two do not have the same steps.
    """
    ours = um.open_run(watched.folder / RUN).metrics("grad/norm/total")["grad/norm/total"].dropna()
    theirs = watched.outcome.norms
    if not theirs or set(ours.index) != set(theirs):
        return float("inf")
    return max(abs(ours[step] / norm - 1) for step, norm in theirs.items())


def differing_lines(case: Case, plain: Ran, watched: Ran) -> list[str]:
    """Returns lines that one command printed and the other did not, besides ours and times."""
    found = []
    for stream in ("stdout", "stderr"):
        left, right = (_lines(case, getattr(ran, stream), ran.folder) for ran in (plain, watched))
        found += [f"{stream} without: {line}" for line in (left - right).elements()]
        found += [f"{stream} with: {line}" for line in (right - left).elements()]
    return found


def _lines(case: Case, text: str, folder: Path) -> Counter[str]:
    # What follows a progress bar without a line break is a line of its own.
    lines = re.split(r"[\r\n]+|(?<=/s\])", text.replace(str(folder), "FOLDER"))
    kept = [line for line in lines if not _OURS.search(line) and not _PROGRESS.search(line)]
    if case.own_lines is not None:
        kept = [line for line in kept if not re.search(case.own_lines, line)]
    return Counter(_TIMES.sub("TIME", line.rstrip()) for line in kept)
