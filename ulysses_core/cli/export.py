"""`ulysses export`: merges adapters into their base and saves the model with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ulysses_core.cli.options import Overrides
from ulysses_monitor.common.errors import InputError

__all__ = ["export"]


def export(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="A YAML file with export_dir, and adapter_name_or_path if any."
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Merge adapters into their base and save the model with its tokenizer."""
    from ulysses_core.cli.checks import check_models
    from ulysses_core.cli.limits import check_modality
    from ulysses_core.cli.logs import configure_logging, quiet_libraries
    from ulysses_core.trainers.deepspeed import prepare_environment
    from ulysses_core.trainers.export import export_model
    from ulysses_core.trainers.stage import load_config

    values = load_config(config, overrides or [])
    if values.export.export_dir is None:
        raise InputError(f"{config}: export_dir is not set; set it to the folder to save in")
    check_models(values)
    check_modality(values)
    configure_logging(debug=False)
    prepare_environment(uses_deepspeed=False)
    quiet_libraries()
    typer.echo(export_model(values))
