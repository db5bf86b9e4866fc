import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ulysses_core.data import CausalCollator
from ulysses_core.data.packing import TokenRow, best_fit_decreasing, pack_rows

X = -100


def test_each_item_goes_into_the_fullest_bin_with_room() -> None:
    assert best_fit_decreasing([2, 5, 4, 3, 6], capacity=10) == [[0, 1, 3], [2, 4]]
    assert best_fit_decreasing([10, 10], capacity=10) == [[0], [1]]
    assert best_fit_decreasing([], capacity=10) == []


def test_every_item_is_packed_once_and_no_bin_overflows() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 64) for _ in range(2000)]
    bins = best_fit_decreasing(lengths, capacity=64)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= 64 for items in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 64) + 1


def test_labels_and_positions_separate_the_documents_of_a_block() -> None:
    [block] = pack_rows([TokenRow([1, 2, 3], [1, 2, 3]), TokenRow([4, 5], [X, 5])], capacity=5)
    assert block.input_ids == [1, 2, 3, 4, 5]
    assert block.position_ids == [0, 1, 2, 0, 1]
    assert block.labels == [X, 2, 3, X, 5]


def test_padding_is_masked_and_has_no_label() -> None:
    batch = CausalCollator(pad_token_id=7)(
        [{"input_ids": [1, 2], "labels": [X, 2]}, {"input_ids": [3], "labels": [3]}]
    )
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].tolist() == [[1, 2], [3, 7]]
    assert batch["labels"].tolist() == [[X, 2], [3, X]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_packed_rows_have_positions_and_no_mask() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [X, 2, 3], "position_ids": [0, 1, 0]},
        {"input_ids": [4], "labels": [4], "position_ids": [0]},
    ]
    batch = CausalCollator(pad_token_id=7, pad_to_multiple_of=4)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 7], [4, 7, 7, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 1, 2]]


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (1, 3), (2, 4), (3, 3), (8, 8)])
def test_rows_are_padded_to_a_multiple(multiple: int | None, width: int) -> None:
    collate = CausalCollator(pad_token_id=0, pad_to_multiple_of=multiple, label_pad_id=0)
    batch = collate([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    assert batch["input_ids"].shape == (1, width)
    assert batch["labels"].tolist() == [[1, 2, 3] + [0] * (width - 3)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_give_the_logits_of_single_ones(attention: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).double().eval()
    documents = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    [block] = pack_rows([TokenRow(ids, ids) for ids in documents], capacity=9)
    assert block.position_ids is not None
    row = {
        "input_ids": block.input_ids,
        "labels": block.labels,
        "position_ids": block.position_ids,
    }
    batch = CausalCollator(pad_token_id=0, pad_to_multiple_of=6)([row])
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0, :9]
        alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in documents])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
