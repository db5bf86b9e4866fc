"""The sources of a run: a run directory, TensorBoard event files, a Trainer's state."""

from ulysses_monitor.reading.sources.base import Source
from ulysses_monitor.reading.sources.directory import DirectorySource
from ulysses_monitor.reading.sources.finding import find_source, source_at
from ulysses_monitor.reading.sources.tensorboard import TensorBoardSource, find_event_folders
from ulysses_monitor.reading.sources.trainer_state import TrainerStateSource

__all__ = [
    "DirectorySource",
    "Source",
    "TensorBoardSource",
    "TrainerStateSource",
    "find_event_folders",
    "find_source",
    "source_at",
]
