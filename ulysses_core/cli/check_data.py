"""`ulysses check-data`: the health of a config's data, before any GPU is used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ulysses_core.cli.checks import check_models
from ulysses_core.cli.limits import check_modality
from ulysses_core.cli.logs import quiet_libraries
from ulysses_core.cli.tables import as_text
from ulysses_core.data import check_sources
from ulysses_core.data.files import list_files
from ulysses_core.data.health import Finding, Health, check_health
from ulysses_core.data.registry import find_datasets
from ulysses_core.trainers.stage import find_stage, load_config
from ulysses_monitor.common.formatting import share

if TYPE_CHECKING:
    from ulysses_core.config import RunConfig

__all__ = ["check_data"]

_STYLES = {"serious": "bold red", "warning": "yellow", "note": ""}
_BLOCK = 1 << 20


def check_data(path: Path, overrides: list[str], *, as_json: bool, plot: Path | None) -> int:
    """Checks the data of a config, prints what was found, and returns the exit code.

    Args:
        path: the config.
        overrides: its keys to override.
        as_json: print a JSON object instead of tables.
        plot: also write a picture to this file.

    Raises:
        InputError: the config or a file is wrong, or the picture cannot be written.
    """
    config = load_config(path, overrides)
    check_models(config)
    check_modality(config)
    if plot is not None:
        from ulysses_monitor.reading import charts

        charts.check_picture("check-data", plot)
    stage = find_stage(config.finetuning.stage)
    check_sources(config.data.model_copy(update={"bad_rows": "skip"}), stage)
    quiet_libraries()
    from ulysses_core.trainers.build import build_tokenizer

    tokenizer = build_tokenizer(config.model)
    with _show_progress(config) as on_rows:
        health = check_health(config.data, stage, tokenizer, on_rows)
    if plot is not None:
        from ulysses_core.cli.data_picture import write_picture

        write_picture(health, config.data.cutoff_len, plot)
    if as_json:
        typer.echo(json.dumps(_as_json(health), indent=2, allow_nan=False))
    else:
        _print(health, config)
    return 1 if health.is_serious else 0


@contextmanager
def _show_progress(config: RunConfig) -> Iterator[Any]:
    """Shows a bar on standard error, if it is a terminal; yields what to tell new rows to."""
    columns = (TextColumn("checking rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(
            "rows", total=_count_lines(config) if console.is_terminal else None
        )
        yield lambda rows: progress.advance(task, rows)


def _count_lines(config: RunConfig) -> int | None:
    """Returns the number of rows if all files have one a line, which is quick to count."""
    names = [*config.data.dataset, *config.data.eval_dataset]
    total = 0
    for spec in find_datasets(names, config.data.dataset_dir):
        for file in list_files(spec.path):
            if file.suffix.lower() not in (".jsonl", ".txt"):
                return None
            with file.open("rb") as stream:
                total += sum(part.count(b"\n") for part in iter(lambda: stream.read(_BLOCK), b""))
    limit = config.data.max_samples
    return total if limit is None else min(total, limit * len(names))


def _as_json(health: Health) -> dict[str, Any]:
    return dataclasses.asdict(health) | {"is_serious": health.is_serious}


def _print(health: Health, config: RunConfig) -> None:
    console = Console(highlight=False)
    names = ", ".join([*config.data.dataset, *config.data.eval_dataset])
    template = config.data.template or "the tokenizer's"
    console.print(
        as_text(f"{names}: stage {health.stage}, template {template}", "bold"), soft_wrap=True
    )
    console.print(_make_numbers(health))
    for finding in health.findings:
        _print_finding(console, finding)
    if not health.findings:
        console.print(Text("Nothing was found.", "green"))
    console.print()
    console.print(as_text(f"found nothing: {', '.join(health.clean)}", "dim"))
    for reason in dict.fromkeys(health.skipped.values()):
        checks = [name for name, why in health.skipped.items() if why == reason]
        console.print(as_text(f"not checked ({reason}): {', '.join(checks)}", "dim"))


def _make_numbers(health: Health) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    heads = ("rows", "tokens", "trained on", "cut", "answers cut", "shortest", "median", "95 %")
    table.add_column("")
    for head in (*heads, "longest"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, of in health.splits.items():
        covered = share(of.trained / of.tokens) if of.tokens else "0%"
        lengths = [f"{of.lengths.get(key, 0):,}" for key in ("min", "median", "p95", "max")]
        counts = [f"{n:,}" for n in (of.rows, of.tokens)]
        table.add_row(name, *counts, covered, f"{of.truncated:,}", f"{of.cut_answers:,}", *lengths)
    return table


def _print_finding(console: Console, finding: Finding) -> None:
    console.print()
    head = as_text(finding.severity, _STYLES[finding.severity])
    console.print(head.append(f"  {finding.check}: ", "bold").append_text(as_text(finding.message)))
    for example in finding.examples:
        console.print(as_text(f"  {example}", "dim"), soft_wrap=True)
    more = (finding.count or 0) - len(finding.examples)
    if finding.examples and more > 0:
        console.print(as_text(f"  and {more:,} more", "dim"))
    console.print(as_text(f"  {finding.advice}"))
