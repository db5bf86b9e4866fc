"""The allow-list: model families and options that sequence parallelism was shown to train rightly.

`families.yaml` is the list. `tests/core/parallel/test_families.py` shows that it is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ulysses_core.parallel.families.small import name_options, small_config
from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["LIST", "Family", "check_family", "read_refusals", "read_right"]

LIST = Path(__file__).with_name("families.yaml")
"""The file of the list."""

_HELP = (
    "try it with `python -m ulysses_core.parallel.families MODEL`, and if it trains rightly set "
    "check_family to false"
)


@dataclass(frozen=True)
class Family:
    """What was shown of a family besides its default config on rows padded on the right.

    Attributes:
        name: the `model_type`.
        options: options that may be on, as `name=value`.
        rows: other kinds of rows: `left` for padding on the left, `packed`.
    """

    name: str
    options: frozenset[str]
    rows: frozenset[str]


@lru_cache(maxsize=1)
def _read() -> Mapping[str, Any]:
    content: Mapping[str, Any] = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return content


def read_right() -> dict[str, Family]:
    """Returns the families on the list."""
    return {
        name: Family(name, frozenset(entry.get("options", ())), frozenset(entry.get("rows", ())))
        for name, entry in _read()["right"].items()
    }


def read_refusals() -> dict[str, str]:
    """Returns the families that are known not to work, and why."""
    return {name: reason for reason, names in _read()["refused"].items() for name in names}


def check_family(config: Any) -> Family:
    """Finds the model's family on the list.

    Args:
        config: a config of transformers.

    Raises:
        InputError: the family, or an option that is on, was not shown to be right.
    """
    name = config.model_type
    right = read_right()
    if name not in right:
        reason = read_refusals().get(name)
        if reason is not None:
            raise InputError(
                f"sequence parallel: model_type is {name!r}, which is not supported: {reason}; "
                "set sequence_parallel_size to 1 or use another model"
            )
        hint = nearest(name, right)
        raise InputError(
            f"sequence parallel: model_type is {name!r}{hint}, which was not tried; {_HELP}"
        )
    family = right[name]
    unknown = sorted(find_options(config) - family.options)
    if unknown:
        raise InputError(
            f"sequence parallel: the model's config has {', '.join(unknown)}, which {name} was not "
            f"shown to train rightly with; allowed: {', '.join(sorted(family.options))}; {_HELP}"
        )
    return family


def find_options(config: Any) -> set[str]:
    """Returns the options that `config` has on and a default config of its family has not."""
    return name_options(config) - name_options(small_config(type(config)))
