"""The sizes, colours and fonts of every chart."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import matplotlib as mpl

__all__ = [
    "BLUE",
    "FONT_SIZE",
    "FULL_WIDTH",
    "HALF_WIDTH",
    "INK",
    "MIN_SMOOTHED",
    "MUTED",
    "ORANGE",
    "RED",
    "RULE",
    "THIRD_WIDTH",
    "TICK_STEPS",
    "escape_math",
    "with_own_style",
]

P = ParamSpec("P")
R = TypeVar("R")

FULL_WIDTH, HALF_WIDTH, THIRD_WIDTH = 9.6, 4.68, 3.04
"""Widths of a figure in inches; the report shows all of them at the same scale."""

INK, MUTED, RULE = "#2b3036", "#6b727b", "#e2e5e9"
BLUE, ORANGE, RED = "#2760c4", "#cf6a12", "#c93636"

FONT_SIZE = 8.5
"""Of all text in a chart, in points."""

MIN_SMOOTHED = 40
"""A series of fewer points is drawn without its moving average."""

TICK_STEPS = [1, 2, 5, 10]

_NOT_STYLE = re.compile("backend|interactive|toolbar|timezone|webagg|datapath|keymap")


def with_own_style(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` with matplotlib's default style, whatever style the user's program set."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        defaults = {k: v for k, v in mpl.rcParamsDefault.items() if not _NOT_STYLE.search(k)}
        with mpl.rc_context({**defaults, "svg.fonttype": "none"}):
            return function(*args, **kwargs)

    return wrapper


def escape_math(text: str) -> str:
    """Escapes ``$`` in text from a run, so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")
