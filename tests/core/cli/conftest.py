"""A small world for the command line: data, a tokenizer and a config, in a folder of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.commands import run_python
from ulysses_core.cli import main

TEXT = "the a list map set sorts returns holds every value key item of in and first last"
WORDS = TEXT.split()

CONFIG = {
    "stage": "pt",
    "finetuning_type": "full",
    "model_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "tokenizer_name_or_path": "tokenizer",
    "dataset_dir": "data",
    "dataset": "text",
    "val_size": 8,
    "cutoff_len": 32,
    "deepspeed": "zero2",
    "sequence_parallel_size": 2,
    "output_dir": "runs/pt",
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
}


@dataclass
class World:
    """The folder, and a way to run `ulysses` in it."""

    path: Path

    def config(self, name: str = "pt.yaml", **changes: object) -> Path:
        path = self.path / name
        values = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
        path.write_text(yaml.safe_dump(values))
        return path

    def run(
        self, *arguments: str, timeout: float = 150, program: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        environment = {"OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}
        command = [*(program or ("-m", "ulysses_core.cli")), *arguments]
        return run_python(*command, folder=self.path, environment=environment, timeout=timeout)


@pytest.fixture(scope="session")
def make_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], World]:
    def make() -> World:
        path = tmp_path_factory.mktemp("world")
        (path / "data").mkdir()
        sentences = _sentences(120)
        texts = [{"text": text} for text in sentences]
        pairs = [{"instruction": t[:20], "input": "", "output": t} for t in sentences]
        _write_rows(path / "data/text.jsonl", texts)
        _write_rows(path / "data/pairs.jsonl", pairs)
        info = {
            "text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}},
            "pairs": {"file_name": "pairs.jsonl"},
        }
        (path / "data/dataset_info.json").write_text(json.dumps(info))
        _train_tokenizer(sentences).save_pretrained(path / "tokenizer")
        return World(path)

    return make


@pytest.fixture(scope="session")
def compiled_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiles what DeepSpeed otherwise compiles when its first training starts.

    That can take longer than a training may, and one that is killed meanwhile leaves a lock for
    which all others wait.
    """
    program = (
        "from deepspeed.ops.op_builder import ShareMemCommBuilder\nShareMemCommBuilder().load()"
    )
    done = run_python("-c", program, folder=tmp_path_factory.getbasetemp(), timeout=400)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:
    return make_world()


def _sentences(count: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(8, 40))) for _ in range(count)]


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _train_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    tokenizer.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )


@pytest.fixture
def ulysses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ulysses", *arguments])
        loaded = set(sys.modules)
        with pytest.raises(SystemExit) as caught:
            main()
        for name in set(sys.modules) - loaded:  # another test has a module of this name too
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
                del sys.modules[name]
        out, error = capsys.readouterr()
        return int(caught.value.code or 0), out, error

    return run
