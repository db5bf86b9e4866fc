"""`data/end_trained/total`: of the end tokens that are not padding, the share with a label."""

from __future__ import annotations

import pytest
import torch

from ulysses_monitor.probes.batches import BatchReader

END = 9
ROWS = torch.tensor([[1, 2, 3, END, END], [1, END, 4, 5, END]])
"""The first row's last token is padding."""
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def share(labels: torch.Tensor, *, masked: bool = True, ends: tuple[int, ...] = (END,)) -> float:
    reader = BatchReader(ends)
    mask = {"attention_mask": MASK} if masked else {}
    reader.add({"input_ids": ROWS, "labels": labels, **mask})
    sums = {name: float(value) for name, value in reader.take_sums().items()}
    return reader.metrics(sums).get("data/end_trained/total", -1.0)


def test_an_end_in_a_prompt_counts_as_one_that_is_not_trained() -> None:
    labels = ROWS.masked_fill(MASK == 0, -100)
    labels[1, :2] = -100
    assert share(labels) == pytest.approx(2 / 3)


def test_ends_that_the_collator_masks_as_padding_are_not_trained() -> None:
    assert share(ROWS.masked_fill(ROWS == END, -100)) == 0.0


def test_without_a_mask_every_end_counts_and_without_an_end_token_there_is_no_metric() -> None:
    assert share(ROWS, masked=False) == 1.0
    assert share(ROWS, ends=()) == -1.0
    assert share(ROWS, ends=(77,)) == -1.0
