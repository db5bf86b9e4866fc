"""Writes a run under load until it is killed, and notes elsewhere when it published which step.

Run by `test_kill.py`: ``python killed_writer.py RUN NOTES FIRST_STEP``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from ulysses_monitor.bus import Bus
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink

METRICS = 300
PART_ROWS = 40
"""Few, so that many parts are sealed and kills meet that, too."""

MOST_STEPS = 20_000


def values(step: int) -> np.ndarray:
    return np.arange(float(METRICS)) * 1000.0 + step


def main(run: Path, notes: Path, first: int) -> None:
    published = np.memmap(notes, np.float64, "r+", shape=MOST_STEPS)
    directory = RunDirectory(run, "resume")
    directory.start({})
    bus = Bus([StoreSink(directory, PART_ROWS)])
    schema = Schema(tuple(f"a/a/{i}" for i in range(METRICS)))
    other = Schema(("eval/loss/total",))
    print("ready", flush=True)  # noqa: T201
    for step in range(first, first + MOST_STEPS):
        bus.publish(StepRecord(step, time.time(), schema, values(step)))
        if step % 7 == 0:
            bus.publish(StepRecord(step, time.time(), other, np.array([float(step)])))
            bus.publish(Event(kind="alert", step=step, time=time.time(), data={"at": step}))
        published[step - first] = time.monotonic()
        time.sleep(0.002)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
