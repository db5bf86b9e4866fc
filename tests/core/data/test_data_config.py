from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ulysses_core.data import DataConfig


def test_dataset_names_are_a_list_or_a_comma_separated_string() -> None:
    assert DataConfig(dataset="a, b,").dataset == ["a", "b"]
    assert DataConfig(dataset=["a", "b"], eval_dataset=None).eval_dataset == []
    assert DataConfig().dataset_dir == Path("data")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutoff_len": 0}, "greater than 0"),
        ({"max_samples": 0}, "greater than 0"),
        ({"val_size": -0.1, "dataset": "a"}, "greater than or equal to 0"),
        ({"val_size": 2.5, "dataset": "a"}, "expected a fraction below 1 or a whole number"),
        ({"val_size": 0.1}, "val_size is 0.1 but dataset is not set"),
        ({"val_size": 1, "dataset": "a", "eval_dataset": "b"}, "val_size and eval_dataset"),
        ({"mask_history": True, "train_on_prompt": True}, "are both set; keep one of them"),
        ({"cutof_len": 5}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DataConfig().cutoff_len = 5  # type: ignore[misc]


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())
