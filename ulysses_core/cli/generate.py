"""`ulysses generate`: checks the input, starts the ranks, prints the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ulysses_core.cli.checks import ranks_path
from ulysses_core.cli.launch import choose_processes, is_launched, launch
from ulysses_core.cli.logs import quiet_libraries
from ulysses_core.cli.tables import make_table
from ulysses_core.generate import GenerateConfig, check_job, generate, load_generate_config

__all__ = ["generate_answers"]


def generate_answers(
    path: Path, overrides: list[str], nproc: int | None, *, as_json: bool, debug: bool
) -> int:
    """Answers the prompts of a config and returns the exit code.

    Raises:
        InputError: the user's input is wrong.
    """
    config = load_generate_config(path, overrides)
    if not is_launched():
        check_job(config)
        processes = choose_processes(nproc, 1)
        if processes > 1:
            flags = [*(["--json"] if as_json else []), *(["--debug"] if debug else [])]
            return launch(["generate", str(path), *overrides, *flags], processes)
    quiet_libraries()
    with ranks_path():
        summary = generate(config)
    if summary is not None:
        _show(config, summary, as_json=as_json)
    return 0


def _show(config: GenerateConfig, summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary))
        return
    table = make_table(f"answers in {config.output_dir}")
    empty = f", {summary['empty']:,} of them empty" if summary["empty"] else ""
    table.add_row("prompts", f"{summary['prompts']:,}")
    table.add_row("answers", f"{summary['answers']:,}{empty}")
    table.add_row("kept", f"{summary['kept']:,} ({config.keep})")
    if "rewards" in summary:
        table.add_row("best and worst", f"{summary['pairs']:,} pairs")
        for name, mean in summary["rewards"].items():
            table.add_row(f"reward {name}", "-" if mean is None else f"{mean:.3f}")
        for k, share in summary["pass_at_k"].items():
            table.add_row(f"pass@{k}", f"{share:.1%}")
        table.add_row("majority vote", f"{summary['majority']:.1%}")
    Console().print(table)
