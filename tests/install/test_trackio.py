"""The Trackio sink against the real Trackio; `make test-install`.

It gets an environment of its own: Trackio requires an older pillow than `make setup` installs.
"""

from __future__ import annotations

import os
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.install, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]


def test_what_the_sink_writes_is_what_trackio_reads(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [name for name in project["dependencies"] if not name.startswith("torch")]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    extra = project["optional-dependencies"]["trackio"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *needs, *extra], check=True)
    done = subprocess.run(
        [python, "-m", "tests.install.trackio_check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
