"""Notes from the processes of an attached command to the one that started it.

One line per note, appended in one write, so that any number of processes may write at once.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Note", "ProcessFate", "TrainerFate", "read_notes", "write_note"]

TrainerFate = Literal["made", "recorded", "elsewhere", "own", "failed"]
"""What became of a Trainer: it was made; its training is recorded, here or by rank 0 on another
node; it has a monitor of its own; or it trains without one, and the note says why."""

ProcessFate = Literal["started", "imported"]
"""What `startup` reports of a Python process: it could be attached; it imported frameworks."""


@dataclass(frozen=True)
class Note:
    """What one process reports about one Trainer, or about itself.

    Attributes:
        outcome: see `TrainerFate` and `ProcessFate`.
        text: the run directory if the training is recorded, the reason why it is not, or the
            modules of frameworks that were imported.
    """

    outcome: TrainerFate | ProcessFate
    text: str = ""


def write_note(path: Path | None, note: Note) -> None:
    """Appends a note; a failure to write must not reach the training."""
    if path is None:
        return
    with suppress(OSError):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)  # not created: its reader may be gone
        try:
            os.write(file, (json.dumps(asdict(note)) + "\n").encode())
        finally:
            os.close(file)


def read_notes(path: Path) -> list[Note]:
    """Returns every note in the order of writing, each once."""
    notes = [Note(**json.loads(line)) for line in path.read_text().splitlines()]
    return list(dict.fromkeys(notes))
