"""Sampled answers as tensors.

Legend: B answers, P tokens of a prompt, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from trl.trainer.utils import pad

__all__ = ["Batch", "join_answers", "pad_answers"]

Batch = dict[str, Tensor]


def pad_answers(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[float]],
    token: int,
) -> Batch:
    """Returns padded token ids and masks.

    Args:
        prompts: their token ids; padded on the left.
        answers: their token ids; padded on the right.
        sampled: the log-probability of each token of an answer.
        token: the pad token.

    Returns:
        `prompt_ids` and `prompt_mask` [B, P], `completion_ids`, `completion_mask` and `sampled`
        [B, T].
    """
    padded: Batch = {}
    for name, rows, side in (("prompt", prompts, "left"), ("completion", answers, "right")):
        ids = [torch.tensor(row) for row in rows]
        padded[f"{name}_ids"] = pad(ids, padding_value=token, padding_side=side)
        ones = [torch.ones_like(row) for row in ids]
        padded[f"{name}_mask"] = pad(ones, padding_value=0, padding_side=side)
    numbers = [torch.tensor(row) for row in sampled]
    return padded | {"sampled": pad(numbers, padding_value=0.0, padding_side="right")}


def join_answers(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask of prompts and answers [B, P + T]."""
    parts = [(batch[f"prompt_{kind}"], batch[f"completion_{kind}"]) for kind in ("ids", "mask")]
    ids, mask = (torch.cat(pair, dim=1) for pair in parts)
    return ids, mask
