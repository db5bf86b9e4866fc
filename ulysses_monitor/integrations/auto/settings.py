"""The settings of `ulysses attach`, as they travel through the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.validation import describe_problem
from ulysses_monitor.session.settings import MonitorSettings

__all__ = ["STARTUP", "AttachSettings"]

STARTUP = Path(__file__).resolve().parent / "startup"
"""The folder with the `sitecustomize.py` that every Python process of the command runs."""

_VARIABLE = "ULYSSES_ATTACH"


class AttachSettings(BaseModel):
    """How the trainings of one command are recorded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_dir: Path
    """The first training's run directory, absolute: the command may change its folder."""
    command_id: str
    """Identifies this start of `ulysses attach`, to tell its runs from earlier ones."""
    notes: Path | None = None
    """The file that takes the notes, if anybody reads them."""
    monitor: MonitorSettings = MonitorSettings()
    """How each training is recorded."""

    @field_validator("run_dir")
    @classmethod
    def _check_absolute(cls, run_dir: Path) -> Path:
        if not run_dir.is_absolute():
            raise ValueError(f"is {run_dir}; expected an absolute path")
        return run_dir

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Returns `base` with these settings, and with the start-up folder on Python's path."""
        before = [p for p in base.get("PYTHONPATH", "").split(os.pathsep) if p]
        path = [str(STARTUP), *(p for p in before if p != str(STARTUP))]
        own = {_VARIABLE: self.model_dump_json(), "PYTHONPATH": os.pathsep.join(path)}
        if self.notes is not None:
            own[f"{_VARIABLE}_NOTES"] = str(self.notes)  # for what runs before pydantic is there
        return {**base, **own}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> AttachSettings:
        """Reads what `environment` wrote.

        Raises:
            InputError: the variable is missing or damaged.
        """
        if _VARIABLE not in environment:
            raise InputError(f"{_VARIABLE} is not set; start the command with `ulysses attach`")
        try:
            return cls.model_validate_json(environment[_VARIABLE])
        except ValidationError as error:
            raise InputError(f"{_VARIABLE}: {describe_problem(error, cls)}") from None
