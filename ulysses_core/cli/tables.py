"""Tables of the command line, and untrusted text in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulysses_core.config import RunConfig
from ulysses_core.config.keys import explain_accepted
from ulysses_core.data import DataStats

if TYPE_CHECKING:
    from ulysses_monitor.reading import RunReader

__all__ = [
    "as_text",
    "check_description",
    "describe_processes",
    "make_table",
    "print_damage",
    "print_plan",
    "print_summary",
]


def as_text(text: str, style: str = "") -> Text:
    """Returns `text` for rich to print literally, with escape codes and other controls replaced."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style)


def print_damage(run: RunReader) -> None:
    """Prints a line to standard error for each file of `run` that could not be read in full."""
    for name, reason in run.damaged.items():
        line = f"{run}: {name} is damaged; showing what is left of it: {reason}"
        typer.echo(as_text(line).plain, err=True)


def check_description(run: RunReader) -> None:
    """Reads all of `run` but its metrics, so that `print_damage` names what is damaged.

    Raises:
        InputError: run.json cannot be read.
    """
    run.logs_damage = False
    run.event_list()
    _ = run.info


def make_table(title: str) -> Table:
    """Returns an empty table of names and values."""
    table = Table(title=as_text(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def describe_processes(processes: int, sequence_parallel_size: int) -> str:
    """Returns a text such as ``4: 2 data-parallel x 2 sequence-parallel``."""
    groups = processes // sequence_parallel_size
    return f"{processes}: {groups} data-parallel x {sequence_parallel_size} sequence-parallel"


def _describe_rows(stats: DataStats) -> str:
    parts = [
        f"{stats.examples:,} examples, {stats.rows:,} rows",
        f"{stats.tokens:,} tokens, {stats.trained_tokens:,} of them trained on",
    ]
    if stats.truncated:
        cut = f"{stats.truncated:,} examples cut at cutoff_len, {stats.cut_answers:,} in an answer"
        parts.append(cut)
    if stats.dropped:
        parts.append(f"{stats.dropped:,} left out")
    return "; ".join(parts)


def print_plan(config: RunConfig, processes: int, stats: dict[str, DataStats]) -> None:
    """Prints what a run would do."""
    table = make_table(f"plan of {config.name}")
    table.add_row("stage", f"{config.finetuning.stage}, {config.finetuning.finetuning_type}")
    model = config.model.model_name_or_path or f"random weights, {config.model.architecture}"
    table.add_row("model", as_text(model))
    size = config.settings.sequence_parallel_size
    table.add_row("processes", describe_processes(processes, size))
    table.add_row("DeepSpeed", _describe_deepspeed(config))
    table.add_row("data", as_text(", ".join(config.data.dataset) or "tokenised rows"))
    for name, of_split in stats.items():
        table.add_row(f"rows ({name})", as_text(_describe_rows(of_split)))
    run_dir = str(config.settings.output_dir or f"runs/{config.name}-<time>")
    table.add_row("run directory", as_text(run_dir))
    for key, value in config.training.items():
        table.add_row(as_text(key), as_text(str(value)))
    Console().print(table)
    for key, meaning in explain_accepted(config).items():
        typer.echo(f"{key}: {meaning}")


def _describe_deepspeed(config: RunConfig) -> str:
    if config.deepspeed is None:
        return "not used"
    return f"ZeRO-{config.deepspeed.get('zero_optimization', {}).get('stage', 0)}"


def print_summary(run: RunReader, report: Path | None) -> None:
    """Prints the first and last values of a run, its alerts and its actions."""
    numbers = run.summary()
    table = make_table(f"{numbers['name']}: {numbers['steps']} steps, {numbers['status']}")
    table.add_row("loss", _change(numbers["loss_first"], numbers["loss_last"]))
    table.add_row("held-out loss", _change(numbers["eval_loss_first"], numbers["eval_loss_last"]))
    table.add_row("gradient norm", _change(numbers["grad_norm_first"], numbers["grad_norm_last"]))
    if numbers["lora_ratio_last"] is not None:
        ratio = _change(numbers["lora_ratio_first"], numbers["lora_ratio_last"])
        table.add_row("LoRA B/A gradient ratio", ratio)
    table.add_row("tokens per second", _number(numbers["tokens_per_second"], "{:,.0f}"))
    table.add_row("alerts", as_text(_describe_alerts(run)))
    from ulysses_monitor.report import summarize_actions

    if actions := summarize_actions(run):
        texts = [
            f"{a['policy']}: {a['action']} at {a['steps']} steps ({a['mode']})" for a in actions
        ]
        table.add_row("policies", as_text(", ".join(texts)))
    table.add_row("time in the monitor", _number(numbers["monitor_share"], "{:.2%}"))
    table.add_row("run directory", as_text(str(run)))
    if report is not None:
        table.add_row("report", as_text(str(report)))
    Console().print(table)


def _describe_alerts(run: RunReader) -> str:
    alerts = run.event_list("alert")
    if not alerts:
        return "none"
    steps = [f"{alert.get('rule', 'a rule')} at step {alert['step']}" for alert in alerts]
    return ", ".join(steps[:3]) + (f" and {len(steps) - 3} more" if len(steps) > 3 else "")


def _change(before: float | None, after: float | None) -> str:
    return f"{_number(before, '{:.4g}')} → {_number(after, '{:.4g}')}"


def _number(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    return "∞" if math.isinf(value) else form.format(value)
