"""What `ulysses attach` and the processes it starts tell each other; needs no transformers.

The command line puts `AttachSettings` into the environment. In every Python process below,
`startup` reads them, and `callback` records each training. What came of it goes into the notes,
which the command line reads at the end.
"""

from ulysses_monitor.integrations.auto.notes import Note, TrainerFate, read_notes, write_note
from ulysses_monitor.integrations.auto.places import check_first_place, choose_place
from ulysses_monitor.integrations.auto.settings import AttachSettings

__all__ = [
    "AttachSettings",
    "Note",
    "TrainerFate",
    "check_first_place",
    "choose_place",
    "read_notes",
    "write_note",
]
