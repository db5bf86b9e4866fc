"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["replace_file", "sync_directory"]


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` once the block has ended without an error.

    Readers see the old file or the complete new one, also after a power cut. If the block fails,
    the old file stays as it was and nothing is left of the new one. The new file has a fixed name
    beside `path` until then, so only one process may write it at a time, and one that is killed
    leaves a file that the next one replaces.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Waits until a power cut can no longer undo the renames in `directory`."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
