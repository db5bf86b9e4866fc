"""The rows to train on at which an initialisation of LoRA looks, whatever the stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ulysses_core.config import RunConfig
from ulysses_core.lora.inits import needs_rows
from ulysses_monitor.records.batch_keys import IGNORE_INDEX

__all__ = ["read_init_rows"]


def read_init_rows(config: RunConfig, data: Any) -> list[dict[str, Any]]:
    """Returns the first `lora_init_rows` rows of a data set, as `init_lora` takes them.

    Args:
        config: the run's; unless it makes new adapters that look at rows, there are none.
        data: the tokenised rows of a stage, a `Dataset` or a stream.
    """
    finetuning = config.finetuning
    if finetuning.finetuning_type != "lora" or not needs_rows(finetuning.init):
        return []
    return [_as_tokens(row) for row in data.take(finetuning.lora_init_rows)]


def _as_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's tokens; the labels are those of its (chosen) answer, or of its prompt."""
    if "input_ids" in row:
        return dict(row)
    prompt = row.get("prompt_ids") or []
    answer = row.get("chosen_ids") or row.get("completion_ids") or row["prompt"]
    return {
        "input_ids": [*prompt, *answer],
        "labels": [*([IGNORE_INDEX] * len(prompt)), *answer],
    }
