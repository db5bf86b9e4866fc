"""What is run: a client, and one training with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["RUN", "Case", "Client", "Outcome", "read_trainer_state", "write_files"]

RUN = "run"
"""The watched training's run directory, below the folder that its command runs in."""

_TIMES = ("runtime", "per_second", "time", "memory", "speed", "elapsed")
"""Parts of names of logged numbers that differ between two equal trainings."""


@dataclass(frozen=True)
class Client:
    """A program or library that trains, in one version, in a virtual environment of its own.

    Attributes:
        package: the distribution whose version the table shows.
        packages: requirements that pip installs, after torch; exact versions.
        folder: its environment's name, if there is one for another version of the package too.
        ours: how this package is installed into it, with its extras.
        without: packages that pip brings but that cannot be imported beside a CPU build of torch;
            they are removed.
        stand_ins: of these, the ones that the client imports all the same, without using them; an
            empty module takes their place.
        has_transformers: whether it can build the models; without them a case brings its own.
    """

    package: str
    packages: tuple[str, ...]
    folder: str = ""
    ours: str = "ulysses-toolkit"
    without: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()
    has_transformers: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a training left behind.

    Attributes:
        numbers: everything that it logged, in order, without times; must be equal bit for bit.
        norms: the gradient norm before clipping of each step that logged one, by step.
    """

    numbers: list[Mapping[str, Any]]
    norms: Mapping[int, float]


def read_trainer_state(folder: Path) -> Outcome:
    """Reads the newest ``trainer_state.json`` below `folder`, written by a transformers Trainer."""
    states = [json.loads(path.read_text()) for path in folder.glob("**/trainer_state.json")]
    log = max(states, key=lambda state: state["global_step"])["log_history"]
    norms = {entry["step"]: float(entry["grad_norm"]) for entry in log if "grad_norm" in entry}
    return Outcome([_without_times(entry) for entry in log], norms)


def _without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not any(part in k for part in _TIMES)}


@dataclass(frozen=True)
class Case:
    """One training, run twice: as it is, and with the monitor.

    Each run has a new folder as working directory, with `files` in it. Beside that folder are
    ``../llama`` and ``../qwen2``: small models with a tokenizer and a ChatML template, the same for
    both runs. The command trains on the CPU, logs every step, and writes its weights somewhere
    below the working directory.

    Attributes:
        client: what runs it.
        variant: what is trained, for the table.
        command: the words of the command.
        files: what to write before it runs, by name: text; or an object for ``.json``, ``.yaml``
            and ``.jsonl`` (a list of rows).
        watched: the command with the monitor, if it is not ``ulysses attach -- COMMAND``; it
            records to `RUN`.
        environment: variables of both commands.
        read: reads what a training left in its folder.
        weights: patterns of the files with weights; at least one must be there, all must be equal.
        own_lines: a pattern of lines that only the watched command prints, beside our own.
    """

    client: Client
    variant: str
    command: Sequence[str]
    files: Mapping[str, Any] = field(default_factory=dict)
    watched: Sequence[str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Path], Outcome] = read_trainer_state
    weights: tuple[str, ...] = ("**/*.safetensors",)
    own_lines: str | None = None

    def __str__(self) -> str:
        return self.variant.replace(", ", "-").replace(" ", "_")

    def watched_command(self) -> list[str]:
        """Returns the words of the command with the monitor."""
        if self.watched is not None:
            return list(self.watched)
        return ["ulysses", "attach", "--run-dir", RUN, "--", *self.command]


def write_files(files: Mapping[str, Any], folder: Path) -> None:
    """Writes a case's files."""
    writers = {".json": json.dumps, ".yaml": yaml.safe_dump, ".jsonl": _lines}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else writers[path.suffix](content)
        path.write_text(text)


def _lines(rows: Sequence[Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
