"""TRL's Trainers on the rows of `HFTraining`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.hf import HFTraining
from benchmarks.faults.model import VOCABULARY

__all__ = ["make_dpo", "make_sft", "make_words"]


def make_words() -> Any:
    """Returns a tokenizer of the vocabulary, of which three words are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    names = [*special.values(), *(f"w{i}" for i in range(VOCABULARY - len(special)))]
    words = Tokenizer(
        models.WordLevel({n: i for i, n in enumerate(names)}, unk_token=special["unk_token"])
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def make_sft(training: HFTraining, model: Any, rows: Any, folder: Path) -> Any:
    """Returns an SFTTrainer that trains on answers alone."""
    import trl
    from datasets import Dataset

    prompt = training.setting.length // 4
    mask = [0] * prompt + [1] * (training.setting.length - prompt)
    data = [{"input_ids": row["input_ids"], "completion_mask": mask} for row in rows]
    arguments = {"bf16": False, "gradient_checkpointing": False, "completion_only_loss": True}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**training.trainer_arguments(folder) | arguments),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:8]),
        processing_class=make_words(),
    )


def make_dpo(training: HFTraining, model: Any, rows: Any, folder: Path) -> Any:
    """Returns a DPOTrainer; rejected answers are random."""
    import trl
    from datasets import Dataset

    half, draw = training.setting.length // 2, torch.Generator().manual_seed(1)

    def words(ids: list[int]) -> str:
        return " ".join(f"w{i % (VOCABULARY - 3)}" for i in ids)

    data = [
        {
            "prompt": words(row["input_ids"][:half]) + " ",
            "chosen": words(row["input_ids"][half:]),
            "rejected": words(torch.randint(VOCABULARY, (half,), generator=draw).tolist()),
        }
        for row in rows[:128]
    ]
    arguments = {"bf16": False, "gradient_checkpointing": False}
    return trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(**training.trainer_arguments(folder) | arguments),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:8]),
        processing_class=make_words(),
    )
