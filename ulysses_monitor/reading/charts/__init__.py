"""The look of every chart, which `RunReader.plot` and the report share.

It uses matplotlib's object API only: it never touches pyplot and leaves no rcParam changed.
"""

from ulysses_monitor.reading.charts.axes import (
    add_color_bar,
    add_legend,
    choose_y_scale,
    fit_step_axis,
    set_log_scale,
    set_title,
    stack_axes,
)
from ulysses_monitor.reading.charts.lines import (
    draw_line,
    mark_alerts,
    mark_steps,
    thin_out,
    with_holes,
)
from ulysses_monitor.reading.charts.saving import check_picture, save_figure
from ulysses_monitor.reading.charts.style import (
    BLUE,
    FONT_SIZE,
    FULL_WIDTH,
    HALF_WIDTH,
    INK,
    MIN_SMOOTHED,
    MUTED,
    ORANGE,
    RED,
    RULE,
    THIRD_WIDTH,
    TICK_STEPS,
    escape_math,
    with_own_style,
)

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
    "add_color_bar",
    "add_legend",
    "check_picture",
    "choose_y_scale",
    "draw_line",
    "escape_math",
    "fit_step_axis",
    "mark_alerts",
    "mark_steps",
    "save_figure",
    "set_log_scale",
    "set_title",
    "stack_axes",
    "thin_out",
    "with_holes",
    "with_own_style",
]
