"""One line to the user that shows whatever the user's script does with logging."""

from __future__ import annotations

import sys

__all__ = ["notify"]


def notify(line: str) -> None:
    """Writes `line` to standard error."""
    if sys.stderr is not None:  # a process without a console has none
        sys.stderr.write(f"ulysses: {line}\n")
