"""How a command ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_VERSION_WITH_BAD_CLEANUP = """
import atexit, os, sys
from ulysses_core.cli import main

atexit.register(os.abort)
sys.argv = ["ulysses", "--version"]
main()
"""


@pytest.mark.parametrize("is_rank", [True, False])
def test_cleanup_cannot_fail_a_rank_that_has_finished(is_rank):
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    ended = subprocess.run(
        [sys.executable, "-c", _VERSION_WITH_BAD_CLEANUP],
        env=environment | ({"RANK": "0"} if is_rank else {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode == 0) == is_rank
    assert ended.stdout.startswith("ulysses ")
