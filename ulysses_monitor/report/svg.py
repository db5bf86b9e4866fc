"""Turns a figure into SVG that follows the page's light or dark theme."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from ulysses_monitor.reading import charts

__all__ = ["to_svg"]

_CSS_VARIABLES = {
    charts.INK: "ink",
    charts.MUTED: "muted",
    charts.RULE: "rule",
    charts.BLUE: "blue",
    charts.ORANGE: "orange",
    charts.RED: "red",
}


@charts.with_own_style
def to_svg(figure: Figure, name: str) -> str:
    """Renders a figure as an ``<svg>`` element for use inside a page.

    It has no prolog, namespaces or links; each colour is a CSS variable that the page may set.

    Args:
        figure: the figure to render.
        name: a prefix that makes the element's ids unique in the page.
    """
    buffer = io.StringIO()
    mpl.rcParams["svg.hashsalt"] = name
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in _CSS_VARIABLES.items():
        text = text.replace(color, f"var(--{variable}, {color})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans, sans-serif)", text)
