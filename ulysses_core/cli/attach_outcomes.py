"""The closing lines of `ulysses attach`: what was recorded, or why nothing was and what to do."""

from __future__ import annotations

import shlex
from pathlib import Path

from ulysses_monitor.integrations.auto import Note

__all__ = ["describe_outcomes"]

_WATCH = "to record your own loop, put it in: with monitor.watch(model, optimizer): ..."
_LIGHTNING = "to record it, add um.LightningCallback(monitor) to its Trainer's callbacks"
_ADVICE = {
    "lightning": _LIGHTNING,
    "pytorch_lightning": _LIGHTNING,
    "ray": "to record it, attach a monitor in the function that trains, see docs/ways_in.md",
}
"""What to do about a framework that trains without a Trainer of transformers."""


def describe_outcomes(notes: list[Note], code: int) -> list[str]:
    """Returns a line about each Trainer of a command that ended with exit code `code`.

    Without any, one line says why nothing was recorded.
    """
    lines = [_describe(note) for note in notes if note.outcome in ("recorded", "failed", "own")]
    if lines:
        return lines
    if any(note.outcome == "elsewhere" for note in notes):
        return ["recorded by rank 0 on another node"]
    return [
        f"nothing recorded: {_explain(notes, f' before it exited with {code}' if code else '')}"
    ]


def _describe(note: Note) -> str:
    if note.outcome == "recorded":
        run = Path(note.text)
        shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
        return f"recorded {shown}; to see it, run: ulysses report {shlex.quote(str(shown))}"
    if note.outcome == "own":
        return "skipped a Trainer that has its own monitor"
    return f"not recorded: {note.text}"


def _explain(notes: list[Note], end: str) -> str:
    """Returns why there was no training to record, and what to do if the command succeeded."""
    outcomes = {note.outcome for note in notes}
    frameworks = _frameworks(notes)
    who = f"the command imported {', '.join(frameworks)} and" if frameworks else "the command"
    if "made" in outcomes:
        end = f"its training did not start{end}" if end else "train() was never called"
        return f"{who} created a Trainer, but {end}"
    if end:
        return f"{who} created no Trainer{end}"
    if "started" not in outcomes:
        return (
            "no Python process of the command could be attached; start Python without -I, -E and "
            "-S, and let it inherit PYTHONPATH"
        )
    advice = next((text for name, text in _ADVICE.items() if name in frameworks), _WATCH)
    return f"{who} created no transformers or TRL Trainer; {advice}"


def _frameworks(notes: list[Note]) -> list[str]:
    """Returns the modules that any process imported, each once."""
    found = [name for n in notes if n.outcome == "imported" for name in n.text.split()]
    return list(dict.fromkeys(found))
