"""The table of batch keys against the batches that TRL's collators make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ulysses_monitor.records.batch_keys import BATCH_KEYS

EXAMPLES = {
    "sft": [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}],
    "rm": [{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5], "margin": 0.5}] * 2,
    "dpo": [
        {
            "prompt_ids": [1, 2],
            "chosen_ids": [3],
            "rejected_ids": [4, 5],
            "ref_chosen_logps": -1.0,
            "ref_rejected_logps": -2.0,
        }
    ]
    * 2,
    "kto": [
        {
            "prompt_ids": [1, 2],
            "completion_ids": [3],
            "KL_completion_ids": [4],
            "label": True,
            "ref_logps": -1.0,
            "ref_KL_logps": -2.0,
        }
    ]
    * 2,
}


def batches_of(stage: str) -> list[dict[str, Any]]:
    """Batches of two examples, by each collator of the stage."""
    if stage == "sft":
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator

        options = [{}, {"padding_free": True}, {"return_position_ids": True}]
        return [Collator(pad_token_id=0, **option)(EXAMPLES[stage]) for option in options]
    if stage == "rm":
        from trl.trainer.reward_trainer import DataCollatorForPreference as Pairs

        return [Pairs(pad_token_id=0)(EXAMPLES[stage])]
    if stage == "dpo":
        from trl.trainer.dpo_trainer import DataCollatorForPreference as Preference

        return [Preference(pad_token_id=0)(EXAMPLES[stage])]
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference as Unpaired

    return [Unpaired(pad_token_id=0)(EXAMPLES[stage])]


@pytest.mark.parametrize("stage", EXAMPLES)
def test_the_table_knows_every_key_of_a_stage_and_its_shape(stage: str) -> None:
    known = {key.name: key for key in BATCH_KEYS if stage in key.stages}
    for batch in batches_of(stage):
        size = 2 * len(EXAMPLES[stage]) if stage in ("rm", "dpo") else len(EXAMPLES[stage])
        for name, value in batch.items():
            dimensions = value.dim() if isinstance(value, torch.Tensor) else 0
            shape = known[name].shape.split(" or ")[0]
            assert dimensions == (len(shape.split(",")) if shape else 0), name
            if shape.startswith("[R") and "cu_seq_lens_q" not in batch:
                assert len(value) == size, name
