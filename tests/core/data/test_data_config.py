from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ulysses_core.data import DataConfig


def test_dataset_names_come_as_a_list_or_as_one_string_with_commas() -> None:
    assert DataConfig(dataset="a, b,").dataset == ["a", "b"]
    assert DataConfig(dataset=["a", "b"], eval_dataset=None).eval_dataset == []
    assert DataConfig().dataset_dir == Path("data")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutoff_len": 0}, "greater than 0"),
        ({"max_samples": 0}, "greater than 0"),
        ({"val_size": -0.1, "dataset": "a"}, "greater than or equal to 0"),
        ({"val_size": 2.5, "dataset": "a"}, "neither a fraction below 1 nor a whole number"),
        ({"val_size": 0.1}, "val_size needs a dataset"),
        ({"val_size": 1, "dataset": "a", "eval_dataset": "b"}, "val_size and eval_dataset"),
        ({"mask_history": True, "train_on_prompt": True}, "contradict each other"),
        ({"cutof_len": 5}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DataConfig().cutoff_len = 5  # type: ignore[misc]


def test_packing_is_on_for_pt_and_off_for_sft_unless_set() -> None:
    assert DataConfig().packs("pt")
    assert not DataConfig().packs("sft")
    assert not DataConfig(packing=False).packs("pt")
    assert DataConfig(packing=True).packs("sft")
    assert DataConfig(neat_packing=True).packs("sft")


def test_every_setting_is_described() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())
