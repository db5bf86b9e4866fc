"""Programs as users write them; a case runs each in a folder of its own.

docs/frameworks.md shows parts of them, so that what it shows was run.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.clients.case import Outcome

__all__ = ["read_log", "read_program"]

_HERE = Path(__file__).parent


def read_program(name: str) -> dict[str, str]:
    """Returns the files of a case that runs the program `name`: it, and the texts to train on."""
    return {name: (_HERE / name).read_text(), "rows.py": (_HERE.parent / "rows.py").read_text()}


def read_log(folder: Path) -> Outcome:
    """Reads what a loop wrote: an entry for each optimizer step."""
    log = json.loads((folder / "log.json").read_text())
    return Outcome(log, {step: entry["grad_norm"] for step, entry in enumerate(log, 1)})
