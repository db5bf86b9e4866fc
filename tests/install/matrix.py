"""Runs `trainer_check` under several versions, in an environment of its own; `make test-matrix`.

`python -m tests.install.matrix [TRANSFORMERS ACCELERATE]...` prints a line for each pair. Without
arguments it tries the two ends of the supported range. It downloads the packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"  # a newer one brings CUDA packages to machines without a GPU
ENDS = ("4.57.*", "1.11.*", "5.24.*", "1.15.*")


def main(versions: list[str]) -> int:
    """Checks each pair of versions; returns 1 if one of them fails."""
    if len(versions) % 2:
        sys.stderr.write("expected pairs of versions, such as 5.6.* 1.11.*\n")
        return 2
    failed = False
    with tempfile.TemporaryDirectory(prefix="ulysses-matrix-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        _install(python, TORCH)
        _install(python, str(ROOT))
        for transformers, accelerate in zip(versions[::2], versions[1::2], strict=True):
            _install(python, f"transformers=={transformers}", f"accelerate=={accelerate}")
            check = [str(python), str(ROOT / "tests/install/trainer_check.py")]
            done = subprocess.run(
                check,
                cwd=folder,
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            lines = done.stdout.splitlines() or [f"transformers {transformers}: no result"]
            sys.stdout.write(f"{lines[-1]}\n")
            failed |= done.returncode != 0
    return int(failed)


def _install(python: Path, *packages: str) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *packages], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ENDS)))
