import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WriteDataset = Callable[..., Path]


def build_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    core.train_from_iterator(["the question and the answer of the user"] * 4, trainer)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **tokens)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with no chat template; the test may change its settings."""
    return build_tokenizer()


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """Writes `rows` as a dataset called `name` and returns the dataset folder."""

    def write(
        rows: Any,
        *,
        name: str = "toy",
        file_name: str | None = None,
        raw: str | None = None,
        **entry: Any,
    ) -> Path:
        file_name = file_name or f"{name}.json"
        if raw is None:
            raw = json.dumps(rows)
        (tmp_path / file_name).write_text(raw, encoding="utf-8")
        info_path = tmp_path / "dataset_info.json"
        info = json.loads(info_path.read_text()) if info_path.exists() else {}
        info[name] = {"file_name": file_name, **entry}
        info_path.write_text(json.dumps(info))
        return tmp_path

    return write
