"""The built sdist and wheel; `make test-install`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.install.wheel import run

pytestmark = [pytest.mark.install, pytest.mark.timeout(1800)]


def test_the_sdist_and_the_wheel_can_be_published(wheel: Path) -> None:
    files = sorted(wheel.parent.iterdir())
    assert [f.suffix for f in files] == [".whl", ".gz"]
    said = run(sys.executable, "-m", "twine", "check", "--strict", *files, folder=wheel.parent)
    assert said.count("PASSED") == 2
