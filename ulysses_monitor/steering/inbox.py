"""Commands that people send to a run: rank 0 reads them, all ranks get them at the same step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import broadcast_bytes
from ulysses_monitor.records import Alert, Event
from ulysses_monitor.records.command import LONGEST_TEXT, RERUN, Command, parse_words
from ulysses_monitor.store.control_file import ControlFile

__all__ = ["CommandInbox", "control_event", "obey"]

_PENDING = "steering/command_pending"


class CommandInbox:
    """The commands of `ulysses control` and of alerts, one a step.

    Args:
        device: where the collective backend's tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._file: ControlFile | None = None
        self._pending: Command | None = None
        self._of_alerts: deque[Command] = deque()

    def obey(self, alert: Alert) -> None:
        """Takes what an alert asks for, to be done at the next step; called on rank 0 only.

        Raises:
            InputError: it asks for something that no command can say.
        """
        if words := [word for word in alert.command if word != RERUN]:  # which is done already
            asked = parse_words(words)
            why = " ".join(alert.message.split())[:LONGEST_TEXT]
            self._of_alerts.append(Command(who=f"rule {alert.rule}", why=why, **asked))

    def open(self, run_dir: Path) -> None:
        """Reads commands from the run directory from now on; called on rank 0 only."""
        self._file = ControlFile(run_dir)

    def problems(self) -> list[str]:
        """Returns why commands were refused, each once."""
        return [] if self._file is None else self._file.problems()

    def collect_sums(self) -> dict[str, float]:
        """Returns this rank's numbers, to be summed over ranks: whether a command is pending."""
        if self._pending is None and self._of_alerts:
            self._pending = self._of_alerts.popleft()
        if self._pending is None and self._file is not None:
            self._pending = self._file.poll()
        return {_PENDING: float(self._pending is not None)}

    def receive(self, sums: Mapping[str, float]) -> Command | None:
        """Returns the command of this step, the same on all ranks.

        Args:
            sums: `collect_sums` over all ranks.
        """
        if not sums[_PENDING]:
            return None
        own = b"" if self._pending is None else self._pending.to_json().encode()
        self._pending = None
        return Command.from_json(broadcast_bytes(own, self._device).decode())


def obey(command: Command, apply: Callable[[Command], None], step: int) -> Event:
    """Applies a command and returns the event that says who asked for what, and the result.

    Args:
        command: the command.
        apply: does all of it or, with an `InputError`, nothing.
        step: the optimizer step.
    """
    about = {
        "id": command.id,
        "who": command.who,
        "why": command.why,
        "command": command.describe(),
    }
    try:
        apply(command)
        about["result"] = command.describe()
    except InputError as error:
        about["refused"] = str(error)
    return control_event(step, about)


def control_event(step: int, about: Mapping[str, str]) -> Event:
    """Returns an event of kind ``control``."""
    return Event(kind="control", step=step, time=time.time(), data=about)
