"""Draws the state of a run in a terminal of any width, for the console sink and `ulysses watch`.

Text from a run is untrusted. It goes into `Text`, where rich reads no markup, without control
characters, and in the encoding of the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ulysses_monitor.common.sparkline import sparkline
from ulysses_monitor.sinks.console.state import EVERY_STEP, LOSS, NORM, SAMPLED, AlertLine, RunState

__all__ = ["StatusTable", "clean_text", "severity_style"]

_WIDEST = 120
_LABEL = 18
_CELL = 38
"""Width of a label with its value, in characters."""
_FLAT = 0.005
_ALERT_LINES = 3


def clean_text(words: str, encoding: str) -> str:
    """Returns `words` on one line, in characters that `encoding` has."""
    line = "".join(c if c.isprintable() else " " for c in words)
    return line.encode(encoding, "replace").decode(encoding, "replace")


def severity_style(severity: str) -> str:
    """Returns the style of an alert."""
    return {"critical": "bold red", "info": ""}.get(severity, "yellow")


class StatusTable:
    """The table of a run, for rich to draw.

    Args:
        state: the state; each drawing shows its current content.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(options.max_width, _WIDEST))
        encoding = options.encoding
        for line in _lines(self._state, console, width, encoding):
            line.truncate(width, overflow="crop")
            yield line


def _lines(state: RunState, console: Console, width: int, encoding: str) -> Iterable[Text]:
    title = ": ".join(part for part in (state.name or "training", state.engine) if part)
    yield Text(clean_text(title, encoding), style="bold")
    yield _position(state, width)
    if state.total:
        color = "red" if state.ends_broken() else "green"
        yield _bar(state.step / state.total, width, encoding, color)
    yield from _columns([_cell(*curve) for curve in _curves(state, width, encoding)], width, 1)
    yield from _columns(_numbers(state), width)
    sampled = [_cell(*c) for c in _format_cells(state, SAMPLED)]
    if sampled:
        yield Text(f"sampled at step {state.sampled_at:,}", style="dim")
        yield from _columns(sampled, width)
    if state.dropped:
        lost = ", ".join(f"{name} {count:,.0f}" for name, count in state.dropped.items())
        yield Text(clean_text(f"dropped records: {lost}", encoding), style="yellow")
    if state.alerts:
        yield Text(_alerts_title(state), style="bold")
        for alert in state.alerts:
            yield from _alert(alert, console, width, encoding)


def _position(state: RunState, width: int) -> Text:
    done = f"step {state.step:,}" + (f"/{state.total:,}" if state.total else "")
    share = f"{min(1.0, state.step / state.total):.0%}" if state.total else ""
    left = state.status or _time_left(state.seconds_left())
    right = "  ".join(part for part in (share, left) if part)
    return Text(done + right.rjust(max(len(right) + 2, width - len(done))))


def _bar(share: float, width: int, encoding: str, color: str) -> Text:
    full, empty = "━─" if encoding.startswith("utf") else "#-"
    done = min(width, int(share * width))
    return Text.assemble((full * done, color), (empty * (width - done), "dim"))


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 60:
        return f"{seconds:.0f} s left"
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h left"
    return f"{hours} h {minutes % 60} min left" if hours else f"{minutes} min left"


def _curves(state: RunState, width: int, encoding: str) -> Iterable[tuple[str, str, str]]:
    """Yields label, value and course of loss and gradient norm."""
    for name, values in ((LOSS, state.losses), (NORM, state.norms)):
        if name in state.values:
            label, form = EVERY_STEP[name]
            room = min(40, width - _LABEL - 19)
            spark = sparkline([*values], room) if encoding.startswith("utf") else ""
            trend = " ".join(part for part in (spark, _trend([*values])) if part)
            yield label, form.format(state.values[name]).ljust(7), trend


def _trend(values: Sequence[float]) -> str:
    """Compares the mean of the last steps, at most 50, with that of as many steps before."""
    half = min(50, len(values) // 2)
    if half < 5:
        return ""
    compared = values[-2 * half :]
    if not all(map(math.isfinite, compared)):
        return "not finite"
    now, before = sum(compared[half:]) / half, sum(compared[:half]) / half
    change = (now - before) / abs(before) if before else 0.0
    return "flat" if abs(change) < _FLAT else "rising" if change > 0 else "falling"


def _numbers(state: RunState) -> list[Text]:
    cells = [c for c in _format_cells(state, EVERY_STEP) if c[0] not in ("loss", "gradient norm")]
    if state.rates:
        shown = ", ".join(f"{rate:.3g}" for rate in state.rates[:2])
        more = f" +{len(state.rates) - 2}" if len(state.rates) > 2 else ""
        cells.insert(0, ("learning rate", shown + more, ""))
    if state.held_out is not None:
        step, loss = state.held_out
        cells.insert(0, ("held-out loss", f"{loss:.4f}", f"step {step:,}"))
    return [_cell(*cell) for cell in cells]


def _format_cells(state: RunState, shown: dict[str, tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [
        (label, form.format(state.values[name]), "")
        for name, (label, form) in shown.items()
        if name in state.values
    ]


def _cell(label: str, value: str, note: str) -> Text:
    value_style = "bold red" if value.strip("-%") in ("nan", "inf") else "bold"
    cell = Text(label.ljust(_LABEL), style="dim")
    return Text.assemble(cell, (value, value_style), *((("  " + note, "dim"),) if note else ()))


def _columns(cells: Sequence[Text], width: int, most: int = 4) -> Iterable[Text]:
    """Yields rows with as many cells as fit, at most `most`."""
    count = max(1, min(most, width // _CELL))
    for i in range(0, len(cells), count):
        row = Text()
        for cell in cells[i : i + count]:
            cell.truncate(width // count - 1, overflow="crop", pad=True)
            row.append_text(cell).append(" ")
        row.rstrip()
        yield row


def _alerts_title(state: RunState) -> str:
    if state.alert_count > len(state.alerts):
        return f"{state.alert_count:,} alerts, the last {len(state.alerts)}:"
    return "alerts:" if state.alert_count > 1 else "alert:"


def _alert(alert: AlertLine, console: Console, width: int, encoding: str) -> Iterable[Text]:
    where = f"step {alert.step}"
    has_step = where in alert.text.lower()
    words = clean_text(alert.text if has_step else f"{where} {alert.text}", encoding)
    text = Text(words, style=severity_style(alert.severity))
    lines = text.wrap(console, width, overflow="fold")
    yield from lines[:_ALERT_LINES]
