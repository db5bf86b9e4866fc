"""Fills the package's page templates, and writes pages to files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ulysses_monitor.common import formatting as fmt
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.files import replace_file

__all__ = ["check_target", "render_page", "write_page"]

_TEMPLATES = Path(__file__).with_name("templates")


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """Fills a template, which escapes all text.

    Args:
        template: a file in `templates`.
        context: what it uses.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(fmt, name) for name in ("number", "count", "share", "duration", "when")
    }
    environment.filters["norm"] = lambda x: fmt.number(x) if math.isfinite(x) else "NaN or Inf"
    return environment.get_template(template).render(context)


def check_target(where: str, path: Path, example: str) -> None:
    """Checks that a file can be written, before the work that it takes.

    Raises:
        InputError: the folder of `path` does not exist, or `path` is a directory.
    """
    if path.is_dir():
        raise InputError(f"{where}: {path} is a directory; expected a file such as {example}")
    if not path.parent.is_dir():
        raise InputError(f"{where}: the folder {path.parent} of {path} does not exist; create it")


def write_page(path: Path, html: str) -> None:
    """Writes a page; it replaces an earlier one only once it is complete."""
    with replace_file(path) as file:
        # UTF-8 cannot encode a lone surrogate in a run's text, which must not prevent the page.
        file.write(html.encode(errors="replace"))
