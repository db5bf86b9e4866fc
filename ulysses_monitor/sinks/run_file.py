"""A file to which a sink appends lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.store.appending import AppendFile

__all__ = ["RunFile"]


class RunFile:
    """Appends lines to a file; what a full disk refuses is written later, at the same place.

    Args:
        sink: name of the sink, for messages.
        path: the file, which is continued if it exists. None means `default` in the run directory,
            which is continued if the run resumes and replaced if the run is new.
        default: name of the file in the run directory.
        header: first line of a new file.
    """

    def __init__(self, sink: str, path: str | Path | None, default: str, header: str = "") -> None:
        self._sink, self._default, self._header = sink, default, header
        self._given = None if path is None else Path(path)
        self.path = self._given
        self._replace = False
        self._file: AppendFile | None = None

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Sets the path; the first `append` opens the file."""
        if self._given is None:
            self.path = run_dir / self._default
            self._replace = len(info.get("starts", ())) == 1

    def append(self, lines: str) -> None:
        """Takes `lines`, which end in a line feed; `flush` writes them.

        Raises:
            InputError: neither a path nor a run directory is known.
            OSError: the file cannot be opened.
        """
        if self._file is None:
            self._file = self._open_file()
        self._file.write(lines.encode("utf-8", "backslashreplace"))

    def _open_file(self) -> AppendFile:
        if self.path is None:
            raise InputError(
                f"sink {self._sink}: path is None and there is no run directory; expected a path"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._replace:
            self.path.unlink(missing_ok=True)
            self._replace = False
        file = AppendFile(self.path)
        last = _last_byte(self.path)
        if last == b"":
            file.write(self._header.encode())
        elif last != b"\n":  # a killed writer left an incomplete line
            file.write(b"\n")
        return file

    def flush(self) -> None:
        """Writes what `append` took.

        Raises:
            OSError: the lines could not be written; the next call tries again.
        """
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Writes the rest and closes the file; a later `append` continues it."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return file.read(1)
