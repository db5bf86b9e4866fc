"""Tries a model: trains it, made small, on two processes that share rows and on one.

Usage: ``python -m ulysses_core.parallel.families MODEL``, where MODEL is a config.json, the folder
of a model or a `model_type`. The exit code is 0 if it trains rightly, 1 if not, 2 if the model
cannot be read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ulysses_core.parallel.families.allowed import find_options
from ulysses_core.parallel.families.launch import train_apart
from ulysses_core.parallel.families.proof import Variant, measure
from ulysses_core.parallel.families.small import keep_options
from ulysses_monitor.common.errors import InputError

__all__ = ["main"]

_RANKS = 2


def main(source: str) -> int:
    """Tries the model on all kinds of rows; prints a line for each, and what follows."""
    config = _read_config(source)
    entries = keep_options(config)
    options = sorted(find_options(config))
    names = ", ".join(options) or "none"
    print(f"{config.model_type}, options besides the defaults: {names}")  # noqa: T201
    ropes = [name.partition("=")[2] for name in options if name.startswith("rope_type=")]
    option = ("rope_type", ropes[0]) if ropes else None
    kinds = ("right", "left", "packed")
    variants = [Variant(kind=type(config), option=option, rows=r, entries=entries) for r in kinds]
    whole, split = (train_apart(variants, size) for size in (1, _RANKS))
    right = []
    for kind, one, two in zip(kinds, whole, split, strict=True):
        error = one.get("error") or two.get("error")
        errors = None if error else measure(one, two)
        is_right = errors is not None and errors.is_right
        right += [kind] if is_right else []
        print(f"rows {kind}: {'right' if is_right else 'WRONG'}: {error or errors}")  # noqa: T201
    if "right" not in right:
        print("The model does not train rightly; use sequence_parallel_size 1.")  # noqa: T201
        return 1
    print(f"The model trains rightly on rows: {', '.join(right)}; set check_family to false.")  # noqa: T201
    return 0


def _read_config(source: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if Path(source).exists():
            return AutoConfig.from_pretrained(source)
        return CONFIG_MAPPING[source]()
    except (KeyError, OSError, ValueError) as error:
        raise InputError(
            f"model {source}: cannot read its config; expected a config.json, a model's folder or "
            "a model_type of transformers"
        ) from error


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1]))
    except InputError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
