"""Installs the wheel with one extra after another; `make test-install`.

`python -m tests.install.extras WHEEL [EXTRA ...]` prints a line for each extra (`none` is the wheel
alone): what it adds to a virtual environment that has only torch, and the seconds to the first
metric. Each extra gets an environment of its own, in which torch's files are links to those of the
first one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.install.matrix import TORCH

__all__ = ["EXTRAS", "Installed", "format_row", "install_extra", "make_base"]

EXTRAS = (
    *("", "kernels", "plots", "tensorboard", "trainers", "duckdb", "text-metrics"),
    *("wandb", "mlflow", "prometheus", "opentelemetry", "trackio", "core", "all"),
)
"""The extras that users install; the empty one is the wheel alone."""

_HEAD = (
    "| extra | packages | MB | pip install, s | to the first metric, s | packages that it adds |\n"
    "| --- | --- | --- | --- | --- | --- |\n"
)
_LIST = """
import importlib.metadata as m, json
print(json.dumps({d.metadata["Name"].lower(): sum(f.size or 0 for f in d.files or ())
                  for d in m.distributions()}))
"""
_FIRST_METRIC = """
import torch, ulysses_monitor as um

model = torch.nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters())
with um.Monitor("first").watch(model, optimizer):
    model(torch.ones(4, 8)).mean().backward()
    optimizer.step()
assert len(um.open_run("first").metrics("grad/norm/total")) == 1
"""


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel.

    Attributes:
        folder: the environment.
        added: bytes of each package that torch alone does not bring, by name.
        seconds: what pip took.
    """

    folder: Path
    added: dict[str, int]
    seconds: float

    def run(self, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment in `folder`."""
        return _run(str(self.folder / "bin" / command[0]), *command[1:], folder=folder)

    def time_first_metric(self) -> float:
        """Returns the seconds in which a new Python imports all, takes a step and reads its run."""
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            done = self.run("python", "-c", _FIRST_METRIC, folder=Path(folder))
            seconds = time.perf_counter() - begin
        assert done.returncode == 0, done.stderr
        return seconds


def make_base(folder: Path) -> Path:
    """Makes an environment that has torch and nothing else."""
    venv.create(folder, with_pip=True)
    _install(folder, TORCH)
    return folder


def install_extra(base: Path, folder: Path, wheel: Path, extra: str) -> Installed:
    """Installs the wheel with an extra, in a copy of the environment `base`."""
    # pip replaces files and never writes into them, so the copy may share them.
    shutil.copytree(base, folder, symlinks=True, copy_function=os.link)
    begin = time.perf_counter()
    _install(folder, f"{wheel}[{extra}]" if extra else str(wheel), TORCH)
    seconds, before = time.perf_counter() - begin, _list(base)
    added = {name: size for name, size in _list(folder).items() if name not in before}
    return Installed(folder, added, seconds)


def format_row(extra: str, installed: Installed) -> str:
    """Returns the extra's line of the table."""
    size, names = sum(installed.added.values()) / 1e6, ", ".join(sorted(installed.added))
    seconds = f"{installed.seconds:.0f} | {installed.time_first_metric():.1f}"
    return f"| {extra or 'none'} | {len(installed.added)} | {size:,.0f} | {seconds} | {names} |\n"


def _install(folder: Path, *packages: str) -> None:
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    done = _run(str(folder / "bin/python"), *pip, *packages, folder=folder)
    if done.returncode:
        raise RuntimeError(f"pip install {' '.join(packages)}: {done.stderr[-3000:]}")


def _list(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(
        _run(str(folder / "bin/python"), "-c", _LIST, folder=folder).stdout
    )
    return found


def _run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"COLUMNS": "200", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def main(arguments: list[str]) -> None:
    """Prints a line of a table for each extra."""
    wheel, *extras = arguments
    sys.stdout.write(_HEAD)
    with tempfile.TemporaryDirectory(prefix="ulysses-extras-") as scratch:
        base = make_base(Path(scratch, "base"))
        for extra in [name.removeprefix("none") for name in extras] or EXTRAS:
            installed = install_extra(base, Path(scratch, "it"), Path(wheel).resolve(), extra)
            sys.stdout.write(format_row(extra, installed))
            sys.stdout.flush()
            shutil.rmtree(installed.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
