"""What `ulysses check-data` needs for many rows, and which planted damage it finds.

    python -m benchmarks.check_data [--rows 1000000]

Makes rows of about fifty tokens from made-up words: of each 1,000, 10 repeat an earlier row, 10
differ from one in a word, and one each has a secret and a mark of a template. It checks 1,000 rows
first, which costs what starting and importing cost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.reading import MEASURED, ROOT

__all__ = ["make_folder"]

_LETTERS = "abcdefghijklmnoprstuvwxyz"
_WORDS = 20_000
_PROMPT, _ANSWER = 8, 16
_PART = 1000
_COPIES = 10
_CHECKS = ("exact_duplicates", "near_duplicates", "secrets", "role_markers")
_CONFIG = {
    "stage": "sft",
    "model_config": {"model_type": "llama"},
    "tokenizer_name_or_path": "tokenizer",
    "dataset_dir": ".",
    "dataset": "made",
    "template": "chatml",
    "output_dir": "run",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    print("| rows | tokens a row | seconds | peak, MB | found: " + ", ".join(_CHECKS) + " |")
    print("|---|---|---|---|---|")
    for rows in (_PART, arguments.rows):
        with tempfile.TemporaryDirectory(prefix="ulysses-check-data-") as scratch:
            print(_measure(Path(scratch), rows), flush=True)


def _measure(folder: Path, rows: int) -> str:
    make_folder(folder, rows)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "check-data", "config.yaml", "--json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr[-2000:])
    *out, peak = done.stdout.splitlines()
    health = json.loads("\n".join(out))
    train, counts = health["splits"]["train"], dict.fromkeys(_CHECKS, 0)
    counts |= {each["check"]: each["count"] for each in health["findings"]}
    found = ", ".join(f"{counts[check]:,}" for check in _CHECKS)
    tokens, megabytes = train["tokens"] / rows, int(peak) / 1024
    return f"| {rows:,} | {tokens:.0f} | {seconds:.1f} | {megabytes:.0f} | {found} |"


def make_folder(folder: Path, rows: int) -> None:
    """Writes rows, a tokenizer that was trained on their words, and a config."""
    draw = random.Random(0)  # noqa: S311 - made rows, not secrets
    words = ["".join(draw.choices(_LETTERS, k=draw.randint(2, 9))) for _ in range(_WORDS)]
    with (folder / "made.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in _make_rows(rows, words, draw))
    (folder / "dataset_info.json").write_text(json.dumps({"made": {"file_name": "made.jsonl"}}))
    _train_tokenizer(words).save_pretrained(folder / "tokenizer")
    (folder / "config.yaml").write_text(yaml.safe_dump(_CONFIG))


def _make_rows(rows: int, words: list[str], draw: random.Random) -> Iterator[dict[str, str]]:
    earlier: list[list[str]] = []
    for i in range(rows):
        place = i % _PART
        text = draw.choices(words, k=_PROMPT + _ANSWER)
        if place < 2 * _COPIES:
            earlier.append(text)
        elif place >= _PART - 2 * _COPIES:  # of each part, the last rows copy its first ones
            text = list(earlier[place - _PART])
            if place < _PART - _COPIES:
                text[-1] = "changed"
        elif place in (500, 501):
            text[-1] = "hf_abcdefgh12345678" if place == 500 else "<|im_start|>"
        yield {"instruction": " ".join(text[:_PROMPT]), "output": " ".join(text[_PROMPT:])}
        if place == _PART - 1:
            earlier.clear()


def _train_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=30_000, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    core.train_from_iterator((" ".join(words[i : i + 50]) for i in range(0, _WORDS, 50)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[0], pad_token=special[0]
    )


if __name__ == "__main__":
    main()
