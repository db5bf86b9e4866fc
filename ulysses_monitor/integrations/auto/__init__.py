"""What `ulysses attach` and the processes it starts tell each other; needs no transformers.

The command line puts `Settings` into the environment. In every Python process below,
`integrations/startup` reads them, and `integrations.attached` records each training; what came of
it goes into the notes, which the command line reads at the end.
"""

from ulysses_monitor.integrations.auto.notes import Note, Outcome, read_notes, write_note
from ulysses_monitor.integrations.auto.places import check_first_place, choose_place
from ulysses_monitor.integrations.auto.settings import Settings

__all__ = [
    "Note",
    "Outcome",
    "Settings",
    "check_first_place",
    "choose_place",
    "read_notes",
    "write_note",
]
