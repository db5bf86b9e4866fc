"""What is not installed costs only what needs it, and a line says what to install.

Each test starts a Python that cannot import some packages. `make test-install` does it for real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pandas.testing import assert_frame_equal

import ulysses_monitor as um

CORE = ("accelerate", "datasets", "deepspeed", "peft", "tokenizers", "transformers", "trl")
EXTRAS = ("matplotlib", "numba", "tensorboard")

WATCH = """
import torch, ulysses_monitor as um

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
monitor = um.Monitor("run", sample_every=1)
with monitor.watch(model, optimizer):
    for _ in range(3):
        loss = model(torch.ones(4, 8)).square().mean()
        monitor.observe(loss=loss, tokens=4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
run = um.open_run("run")
assert run.summary()["steps"] == 3
assert (run.metrics("grad/norm/total") > 0).all(axis=None)
"""


def run_without(
    packages: Sequence[str], code: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    block = f"import sys\nfor name in {tuple(packages)!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ
        | {
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path),
        },
    )


def command(
    packages: Sequence[str], folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    code = f"sys.argv[1:] = {list(arguments)!r}\nfrom ulysses_core.cli import main\nmain()"
    return run_without(packages, code, folder)


@pytest.fixture(scope="module")
def bare_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was recorded with nothing but the monitor's own dependencies."""
    folder = tmp_path_factory.mktemp("bare")
    done = run_without([*CORE, *EXTRAS], WATCH, folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "TensorBoard is not installed" in done.stderr
    assert "pip install 'ulysses-toolkit[tensorboard]'" in done.stderr
    assert not (folder / "run/tensorboard").exists()
    return folder


@pytest.mark.parametrize("missing", [CORE, ("numba",), ("matplotlib",), ("tensorboard",)])
def test_a_loop_is_watched_and_read_whatever_is_missing(
    missing: tuple[str, ...], bare_run: Path, tmp_path: Path
) -> None:
    done = run_without(missing, WATCH, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == ("tensorboard" in missing)
    assert (tmp_path / "run/tensorboard").exists() == ("tensorboard" not in missing)
    bare, found = (
        um.open_run(folder / "run").metrics("grad/*", "optim/*", "param/*")
        for folder in (bare_run, tmp_path)
    )
    assert_frame_equal(bare, found, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["runs", "."],
        ["watch", "run"],
        ["replay", "run"],
        ["store", "compact", "run"],
        ["doctor"],
        ["attach", "--", sys.executable, "-c", ""],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_no_extra_work_without_any(bare_run: Path, arguments: list[str]) -> None:
    done = command([*CORE, *EXTRAS], bare_run, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["report", "run"], "matplotlib", "plots"),
        (["board", "run"], "tensorboard", "tensorboard"),
        (["train", "config.yaml"], "transformers", "core"),
        (["train", "config.yaml", "--dry-run"], "transformers", "core"),
        (["doctor", "config.yaml"], "transformers", "core"),
    ],
)
def test_commands_that_need_an_extra_say_which_in_one_line(
    bare_run: Path, arguments: list[str], package: str, extra: str
) -> None:
    (bare_run / "config.yaml").write_text("stage: sft\nmodel_name_or_path: m\ndataset: d\n")
    (bare_run / "run/tensorboard").mkdir(exist_ok=True)
    done = command([*CORE, *EXTRAS], bare_run, *arguments)
    (bare_run / "run/tensorboard").rmdir()
    assert done.stderr == (
        f"ulysses: {arguments[0]}: {package} is not installed; "
        f"run pip install 'ulysses-toolkit[{extra}]'\n"
    )
    assert done.returncode == 2


def test_doctor_names_the_packages_that_the_training_core_lacks(bare_run: Path) -> None:
    words = " ".join(command(["peft", "deepspeed"], bare_run, "doctor").stdout.split())
    assert "not installed: deepspeed, peft; run pip install 'ulysses-toolkit[core]'" in words


def test_a_plot_and_a_sink_say_what_to_install(bare_run: Path) -> None:
    code = """
import ulysses_monitor as um
for call in (lambda: um.open_run("run").plot("grad/norm/total"),
             lambda: um.Monitor("other", sinks=["tensorboard"])):
    try:
        call()
    except um.InputError as error:
        print(error)
"""
    done = run_without(EXTRAS, code, bare_run)
    plot, sink = done.stdout.splitlines()
    assert plot == "plot: matplotlib is not installed; run pip install 'ulysses-toolkit[plots]'"
    assert sink.startswith("sink tensorboard: needs tensorboard, which is not installed")


def test_without_matplotlib_tensorboard_has_numbers_and_no_pictures(tmp_path: Path) -> None:
    code = WATCH.replace("nn.Linear(8, 8)", "nn.ModuleList([torch.nn.Linear(8, 8)])[0]")
    assert run_without(["matplotlib"], code, tmp_path).returncode == 0
    found = b"".join(f.read_bytes() for f in (tmp_path / "run/tensorboard").iterdir())
    assert b"grad" in found
    assert b"PNG" not in found


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    import importlib.metadata

    done = command([], tmp_path, "--version")
    assert done.stdout == f"ulysses {importlib.metadata.version('ulysses-toolkit')}\n"
