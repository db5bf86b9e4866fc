"""Builds the wheel, and runs commands outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.install.matrix import ROOT

__all__ = ["build_wheel", "run"]


def run(*command: str | Path, folder: Path) -> str:
    """Runs a command that must succeed in `folder`, and returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Builds the sdist and, from it, the wheel into `folder`, and returns the wheel."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)
    (found,) = folder.glob("*.whl")
    return found
