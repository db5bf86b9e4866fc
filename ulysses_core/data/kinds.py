"""What a dataset holds, and whether it suits a stage and its entry in `dataset_info.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ulysses_core.data.files import Row
from ulysses_core.data.registry import INFO_FILE, DatasetSpec
from ulysses_monitor.common.errors import InputError

__all__ = ["Kind", "check_columns", "check_kind"]

Kind = Literal["documents", "conversations", "prompts", "pairs", "tagged"]
"""What the rows of a dataset hold, and a stage reads."""

_MARKS: dict[Kind, str] = {
    "conversations": "holds conversations without preferences, for stages sft, grpo and ppo",
    "pairs": "is a preference dataset (ranking: true), for stages dpo and rm",
    "tagged": "has a kto_tag column, for stage kto",
}


def check_kind(spec: DatasetSpec, stage: str, kind: Kind) -> None:
    """Checks that a dataset holds what a stage reads.

    Raises:
        InputError: The dataset is for another stage.
    """
    found: Kind = "conversations"
    if spec.ranking:
        found = "pairs"
    elif spec.columns.kto_tag:
        found = "tagged"
    if kind == "documents" and found == "conversations":
        if spec.formatting != "alpaca":
            raise InputError(
                f"dataset {spec.name!r}: formatting is {spec.formatting!r}; expected 'alpaca', "
                f"because stage {stage} reads documents from a prompt column"
            )
        return
    if found != kind and not (kind == "prompts" and found == "conversations"):
        raise InputError(
            f"dataset {spec.name!r} {_MARKS[found]}; stage is {stage}, so choose another dataset"
        )


def check_columns(rows: Sequence[Row], spec: DatasetSpec) -> None:
    """Checks that a dataset has the columns that its entry names.

    Raises:
        InputError: A named column is in none of its rows.
    """
    if not spec.has_columns:
        return
    present: set[str] = set()
    for row in rows:
        present.update(row.values)
    # `dict` over a pydantic model gives (field, value) pairs.
    for part, column in dict(spec.columns).items():
        if column is not None and column not in present:
            raise InputError(
                f"{INFO_FILE}: {spec.name}.columns.{part} is {column!r}, which {spec.path} does "
                f"not have; allowed: {', '.join(sorted(present))}"
            )
