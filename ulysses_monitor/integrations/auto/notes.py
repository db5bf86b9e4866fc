"""Notes from the processes of an attached command to the one that started it.

One line a note, appended whole, so that any number of processes may write at a time.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Note", "Outcome", "read_notes", "write_note"]

Outcome = Literal["made", "recorded", "elsewhere", "own", "failed"]
"""What became of a Trainer: it was made; its training is recorded, here or by a rank 0 on another
node; it has a monitor of its own; or it trains without one, for a reason."""


@dataclass(frozen=True)
class Note:
    """What one process has to say of one Trainer.

    Attributes:
        outcome: see `Outcome`.
        text: the run directory where it is recorded, or the reason why it is not.
    """

    outcome: Outcome
    text: str = ""


def write_note(path: Path | None, note: Note) -> None:
    """Appends a note; where that cannot be done, the training must not notice."""
    if path is None:
        return
    with suppress(OSError):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)  # not created: its reader may have left
        try:
            os.write(file, (json.dumps(asdict(note)) + "\n").encode())
        finally:
            os.close(file)


def read_notes(path: Path) -> list[Note]:
    """Every note, in the order of writing, each once."""
    notes = [Note(**json.loads(line)) for line in path.read_text().splitlines()]
    return list(dict.fromkeys(notes))
