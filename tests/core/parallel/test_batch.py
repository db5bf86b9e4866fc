"""Slicing batches of whole rows, without a process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ulysses_core.parallel import SequenceGroup
from ulysses_core.parallel.batch import RowLayout, shard_batch
from ulysses_monitor.common.errors import InputError


def shards(inputs: dict[str, Any], size: int = 2) -> list[dict[str, Any]]:
    return [shard_batch(inputs, SequenceGroup(size, rank, None, 0, 1)) for rank in range(size)]


def together(parts: list[dict[str, Any]], key: str) -> list[list[int]]:
    return torch.cat([part[key] for part in parts], dim=1).tolist()


def boundaries(inputs: dict[str, Any], size: int = 2) -> tuple[tuple[int, ...], ...] | None:
    return shards(inputs, size)[0]["ulysses"].layout.boundaries


IDS = torch.tensor([[1, 2, 3, 4, 5]])


def test_rows_are_padded_and_sliced_and_labels_are_shifted_across_slices() -> None:
    parts = shards({"input_ids": IDS, "labels": IDS * 10})
    assert [part["input_ids"].shape[1] for part in parts] == [3, 3]
    assert together(parts, "input_ids") == [[1, 2, 3, 4, 5, 0]]
    assert together(parts, "position_ids") == [[0, 1, 2, 3, 4, 0]]
    # token 3, the last of the first slice, predicts token 4, the first of the second
    assert together(parts, "shift_labels") == [[20, 30, 40, 50, -100, -100]]
    assert parts[0]["ulysses"].layout.length == 5
    assert parts[0]["ulysses"].layout.boundaries is None


def test_shifted_labels_are_not_shifted_again() -> None:
    parts = shards({"input_ids": IDS, "shift_labels": IDS * 10})
    assert together(parts, "shift_labels") == [[10, 20, 30, 40, 50, -100]]


def test_a_batch_without_labels_keeps_its_other_keys() -> None:
    part = shards({"input_ids": IDS, "use_cache": False, "weights": torch.ones(3)})[0]
    assert "labels" not in part
    assert part["use_cache"] is False
    assert part["weights"].tolist() == [1, 1, 1]


def test_documents_begin_where_positions_restart_and_padding_is_a_document() -> None:
    packed = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    assert boundaries(packed) == ((0, 2, 5, 6),)
    assert boundaries(packed, size=1) == ((0, 2, 5),)
    two = {"input_ids": IDS.repeat(2, 1), "position_ids": torch.tensor([[0, 1, 2, 3, 4]] * 2)}
    assert boundaries(two) is None
    two["position_ids"][1, 4] = 0
    assert boundaries(two) == ((0, 5, 6), (0, 4, 5, 6))


def test_padding_on_the_left_gets_a_boundary() -> None:
    masks = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert boundaries({"input_ids": IDS.repeat(2, 1), "attention_mask": masks}) == (
        (0, 2, 5, 6),
        (0, 5, 6),
    )


def test_padding_on_the_right_gets_no_boundary() -> None:
    assert boundaries({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}) is None


def test_cu_seqlens_cover_the_documents_of_all_rows() -> None:
    layout = RowLayout(5, ((0, 2, 5, 6), (0, 5, 6)))
    cumulative, longest = layout.cu_seqlens(2, 6, torch.device("cpu"))
    assert cumulative.tolist() == [0, 2, 5, 6, 11, 12]
    assert longest == 5
    assert layout.cu_seqlens(2, 6, torch.device("cpu"))[0] is cumulative  # cached
    assert layout.document_ids(2, 6, torch.device("cpu")).tolist() == [
        [0, 0, 1, 1, 1, 2],
        [0, 0, 0, 0, 0, 1],
    ]
    cumulative, longest = RowLayout(6, None).cu_seqlens(2, 6, torch.device("cpu"))
    assert (cumulative.tolist(), longest) == ([0, 6, 12], 6)


def test_a_document_longer_than_the_models_positions_is_refused() -> None:
    group = SequenceGroup(2, 0, None, 0, 1)
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    shard_batch({"input_ids": IDS}, group, max_positions=5)
    shard_batch({"input_ids": IDS, "position_ids": positions}, group, max_positions=3)
    for inputs, allowed in (
        ({"input_ids": IDS}, 4),
        ({"input_ids": IDS, "position_ids": positions}, 2),
    ):
        match = rf"{allowed + 1} tokens, .* has {allowed} positions; shorten"
        with pytest.raises(InputError, match=match):
            shard_batch(inputs, group, max_positions=allowed)


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"input_ids": IDS, "pixel_values": torch.ones(1, 3)}, "pixel_values"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 5, 5)}, "attention_mask has 4"),
        ({"input_ids": IDS, "position_ids": torch.ones(3, 1, 5)}, "position_ids has 3"),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "in the middle"),
        ({"inputs_embeds": torch.ones(1, 5, 2)}, "no input_ids"),
    ],
)
def test_tensors_that_cannot_be_sliced_are_refused_by_name(
    inputs: dict[str, Any], word: str
) -> None:
    with pytest.raises(InputError, match=word):
        shards(inputs)
