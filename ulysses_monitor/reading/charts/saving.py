"""Writes a figure to a file that the user named."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading.charts.style import with_own_style

__all__ = ["check_picture", "save_figure"]

_FORMATS = (".png", ".svg", ".pdf")


@with_own_style
def save_figure(where: str, figure: Figure | None, path: Path) -> None:
    """Writes a figure; the format follows from the file's name.

    Args:
        where: the command, for messages.
        figure: the figure; None if there was nothing to draw.
        path: the file.

    Raises:
        InputError: the file cannot be written, its suffix is unknown, or there is no figure.
    """
    check_picture(where, path)
    if figure is None:
        raise InputError(f"{where}: plot is {path}; there is nothing to draw")
    figure.savefig(path, dpi=150, facecolor="white")


def check_picture(where: str, path: Path) -> None:
    """Checks that a picture can be written, before the work that it takes.

    Args:
        where: the command, for messages.
        path: the file.

    Raises:
        InputError: the file cannot be written, or its suffix is unknown.
    """
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"{where}: plot is {path}; expected a file named *{', *'.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise InputError(f"{where}: the folder {path.parent} of {path} does not exist; create it")
    if path.is_dir():
        raise InputError(f"{where}: {path} is a directory; expected a file such as plot.png")
