"""The rows of the benchmark of check-data have the damage that it says, and no other."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.check_data import make_folder
from ulysses_core.data import DataConfig
from ulysses_core.data.health import check_health
from ulysses_core.trainers.stage import find_stage


def test_planted_damage_is_found(tmp_path: Path) -> None:
    make_folder(tmp_path, 3000)
    config = DataConfig(dataset="made", dataset_dir=tmp_path, template="chatml")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    read: list[int] = []
    health = check_health(config, find_stage("sft"), tokenizer, read.append)
    # Rows of 50 tokens have more than 5 % of special tokens, which is about all of them.
    found = {each.check: each.count for each in health.findings if each.count is not None}
    assert read == [1000, 1000, 1000]
    near = found.pop("near_duplicates")
    assert found == {"exact_duplicates": 30, "secrets": 3, "role_markers": 3}
    assert near is not None
    assert 21 <= near <= 30  # each differs in a word of 24: a similarity of about 0.9
    assert 40 < health.splits["train"].tokens / 3000 < 60
