from __future__ import annotations

import itertools

from ulysses_monitor.records.batch_keys import BATCH_KEYS, ROW_MASKS, names_by_slicing

NAMES = [key.name for key in BATCH_KEYS]


def test_every_key_is_listed_once() -> None:
    assert len(NAMES) == len(set(NAMES))


def test_the_masks_of_rows_are_keys_of_the_table() -> None:
    assert set(itertools.chain(*ROW_MASKS)) <= set(NAMES)


def test_only_keys_with_a_value_per_token_are_sliced() -> None:
    for key in BATCH_KEYS:
        if key.slicing == "sliced":
            assert ", " in key.shape, key.name


def test_sequence_parallelism_slices_what_a_causal_model_takes() -> None:
    assert names_by_slicing("sliced") == {
        "input_ids",
        "attention_mask",
        "labels",
        "position_ids",
        "shift_labels",
    }
