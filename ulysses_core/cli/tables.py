"""The short tables that `ulysses train` prints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulysses_core.config import RunConfig

if TYPE_CHECKING:
    from ulysses_monitor.reading import RunReader

__all__ = ["plain", "plan_table", "summary_table", "two_columns"]


def plain(text: str, style: str = "") -> Text:
    """`text` as it is: rich's markup in it does nothing, and no escape code gets out."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style)


def plan_table(config: RunConfig, processes: int, rows: dict[str, int]) -> None:
    """Prints what a run would do."""
    size = config.settings.sequence_parallel_size
    table = two_columns(f"plan of {config.name}")
    table.add_row("stage", f"{config.finetuning.stage}, {config.finetuning.finetuning_type}")
    model = config.model.model_name_or_path or f"new {config.model.architecture}"
    table.add_row("model", plain(model))
    table.add_row("processes", f"{processes} = data {processes // size} x sequence {size}")
    table.add_row("deepspeed", _engine(config))
    data = ", ".join(f"{name} ({count} rows)" for name, count in rows.items())
    table.add_row("data", plain(data))
    place = str(config.settings.output_dir or f"runs/{config.name}-<time>")
    table.add_row("run directory", plain(place))
    for key, value in config.training.items():
        table.add_row(plain(key), plain(str(value)))
    Console().print(table)


def _engine(config: RunConfig) -> str:
    if config.deepspeed is None:
        return "no"
    return f"ZeRO-{config.deepspeed.get('zero_optimization', {}).get('stage', 0)}"


def summary_table(run: RunReader, report: Path | None) -> None:
    """Prints what a run did, before and after."""
    numbers = run.summary()
    table = two_columns(f"{numbers['name']}: {numbers['steps']} steps, {numbers['status']}")
    table.add_row("loss", _change(numbers["loss_first"], numbers["loss_last"]))
    table.add_row("held-out loss", _change(numbers["eval_loss_first"], numbers["eval_loss_last"]))
    table.add_row("gradient norm", _change(numbers["grad_norm_first"], numbers["grad_norm_last"]))
    if numbers["lora_ratio_last"] is not None:
        ratio = _change(numbers["lora_ratio_first"], numbers["lora_ratio_last"])
        table.add_row("LoRA B/A gradient ratio", ratio)
    table.add_row("tokens per second", _number(numbers["tokens_per_second"], "{:,.0f}"))
    table.add_row("alerts", plain(_alerts(run)))
    from ulysses_monitor.report import summarize_actions

    if actions := summarize_actions(run):
        said = [
            f"{a['policy']}: {a['action']} at {a['steps']} steps ({a['mode']})" for a in actions
        ]
        table.add_row("policies", plain(", ".join(said)))
    table.add_row("monitor's share of the time", _number(numbers["monitor_share"], "{:.2%}"))
    table.add_row("run directory", plain(str(run)))
    if report is not None:
        table.add_row("report", plain(str(report)))
    Console().print(table)


def _alerts(run: RunReader) -> str:
    alerts = run.event_list("alert")
    if not alerts:
        return "none"
    steps = [f"{alert.get('rule', 'a rule')} at step {alert['step']}" for alert in alerts]
    return ", ".join(steps[:3]) + (f" and {len(steps) - 3} more" if len(steps) > 3 else "")


def two_columns(title: str) -> Table:
    """An empty table of names and values."""
    table = Table(title=plain(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _change(before: float | None, after: float | None) -> str:
    return f"{_number(before, '{:.4g}')} → {_number(after, '{:.4g}')}"


def _number(value: Any, form: str) -> str:
    if value is None or math.isnan(value):
        return "-"
    return "∞" if math.isinf(value) else form.format(value)
