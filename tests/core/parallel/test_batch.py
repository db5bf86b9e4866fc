"""How a batch of whole rows becomes slices, without any process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ulysses_core.parallel import SequenceGroup
from ulysses_core.parallel.batch import shard_batch
from ulysses_monitor.errors import InputError


def shards(inputs: dict[str, Any], size: int = 2) -> list[dict[str, Any]]:
    return [shard_batch(inputs, SequenceGroup(size, rank, None, 0, 1)) for rank in range(size)]


def together(parts: list[dict[str, Any]], key: str) -> list[list[int]]:
    return torch.cat([part[key] for part in parts], dim=1).tolist()


def mask(parts: list[dict[str, Any]], size: int, window: int | None = None) -> Tensor | None:
    return parts[0]["ulysses"].mask(size, window, torch.device("cpu"))


IDS = torch.tensor([[1, 2, 3, 4, 5]])


def test_rows_are_padded_sliced_and_their_labels_shifted_across_slices() -> None:
    parts = shards({"input_ids": IDS, "labels": IDS * 10})
    assert [part["input_ids"].shape[1] for part in parts] == [3, 3]
    assert together(parts, "input_ids") == [[1, 2, 3, 4, 5, 0]]
    assert together(parts, "position_ids") == [[0, 1, 2, 3, 4, 0]]
    # token 3, the last of the first slice, predicts token 4, the first of the second
    assert together(parts, "shift_labels") == [[20, 30, 40, 50, -100, -100]]
    assert parts[0]["ulysses"].length == 5
    assert mask(parts, 6) is None


def test_labels_that_are_shifted_already_are_not_shifted_again() -> None:
    parts = shards({"input_ids": IDS, "shift_labels": IDS * 10})
    assert together(parts, "shift_labels") == [[10, 20, 30, 40, 50, -100]]


def test_without_labels_there_are_none_and_other_keys_stay() -> None:
    part = shards({"input_ids": IDS, "use_cache": False, "weights": torch.ones(3)})[0]
    assert "labels" not in part
    assert part["use_cache"] is False
    assert part["weights"].tolist() == [1, 1, 1]


def test_packed_documents_do_not_see_each_other() -> None:
    parts = shards({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 0, 1, 2]])})
    allowed = mask(parts, 6)
    assert allowed is not None
    assert allowed[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("holes", [[0, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
def test_padding_before_a_token_is_hidden_from_it(holes: list[int]) -> None:
    parts = shards({"input_ids": IDS, "attention_mask": torch.tensor([holes])})
    allowed = mask(parts, 6)
    assert allowed is not None
    for q in range(5):
        if holes[q]:
            seen = [k for k in range(6) if allowed[0, 0, q, k]]
            assert seen == [k for k in range(q + 1) if holes[k]]
    assert allowed.any(dim=-1).all()  # a token that sees nothing would become NaN


def test_padding_on_the_right_needs_no_mask() -> None:
    assert (
        mask(shards({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}), 6)
        is None
    )


def test_a_window_hides_what_is_further_back_and_a_wide_one_nothing() -> None:
    parts = shards({"input_ids": IDS})
    allowed = mask(parts, 6, 2)
    assert allowed is not None
    assert [row.nonzero().flatten().tolist() for row in allowed[0, 0]] == [
        [0],
        [0, 1],
        [1, 2],
        [2, 3],
        [3, 4],
        [4, 5],
    ]
    assert mask(parts, 6, 6) is None
    assert mask(parts, 6, 2) is allowed  # made once


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"input_ids": IDS, "pixel_values": torch.ones(1, 3)}, "pixel_values"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 5, 5)}, "attention_mask has 4"),
        ({"input_ids": IDS, "position_ids": torch.ones(3, 1, 5)}, "position_ids has 3"),
        ({"inputs_embeds": torch.ones(1, 5, 2)}, "no input_ids"),
    ],
)
def test_what_cannot_be_sliced_is_refused_by_name(inputs: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        shards(inputs)
