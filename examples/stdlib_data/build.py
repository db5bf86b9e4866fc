"""Writes the data files, their `dataset_info.json` and the tokenizer."""

from __future__ import annotations

import json
import platform
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .pairs import Pair, build_pairs, pretraining_text, split_pairs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MIN_PAIRS", "MIN_VOCAB", "BuildError", "Settings", "build", "is_built"]

FORMAT_VERSION = 1
MIN_PAIRS = 3_000
PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
# Every byte has a token of its own, so that any text can be encoded.
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)

BUILD_FILE = "build.json"
DATA_FILES = (
    "stdlib_qa_train.jsonl",
    "stdlib_qa_heldout.jsonl",
    "stdlib_text_train.jsonl",
    "stdlib_text_heldout.jsonl",
    "dataset_info.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)


class BuildError(Exception):
    """The data cannot be built here; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide the content of a build."""

    seed: int = 0
    vocab_size: int = 2048
    heldout: float = 0.05
    """Share of the pairs that neither the training files nor the tokenizer see."""

    def stamp(self) -> str:
        """Return the text of `build.json`; equal stamps mean equal files."""
        return _json(
            {
                "format_version": FORMAT_VERSION,
                "python": platform.python_version(),
                "seed": self.seed,
                "vocab_size": self.vocab_size,
                "heldout": self.heldout,
            },
            indent=2,
        )


def train_tokenizer(train: Sequence[Pair], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the questions and texts of `train`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [f"{pair.question}\n{pretraining_text(pair)}" for pair in train]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write_files(
    folder: Path, train: Sequence[Pair], heldout: Sequence[Pair], tokenizer: Tokenizer
) -> None:
    """Write the data files, their `dataset_info.json` and the tokenizer into `folder`."""
    for split, pairs in (("train", train), ("heldout", heldout)):
        qa = ({"instruction": p.question, "input": "", "output": p.answer} for p in pairs)
        _write_jsonl(folder / f"stdlib_qa_{split}.jsonl", qa)
        texts = ({"text": pretraining_text(p)} for p in pairs)
        _write_jsonl(folder / f"stdlib_text_{split}.jsonl", texts)
    _write(folder / "dataset_info.json", _json(dataset_info(), indent=2))
    _save_tokenizer(folder / "tokenizer", tokenizer)


def dataset_info() -> dict[str, dict[str, object]]:
    """Return the four data sets in the form of LLaMA-Factory's `dataset_info.json`."""
    alpaca = {"prompt": "instruction", "query": "input", "response": "output"}
    info: dict[str, dict[str, object]] = {}
    for suffix, split in (("", "train"), ("_heldout", "heldout")):
        info[f"stdlib_qa{suffix}"] = {
            "file_name": f"stdlib_qa_{split}.jsonl",
            "formatting": "alpaca",
            "columns": alpaca,
        }
        info[f"stdlib_text{suffix}"] = {
            "file_name": f"stdlib_text_{split}.jsonl",
            "columns": {"prompt": "text"},
        }
    return info


def _save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,  # it would delete blanks before punctuation
    ).save_pretrained(folder)


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    _write(path, "".join(_json(row) for row in rows))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent) + "\n"


def is_built(out: Path, settings: Settings) -> bool:
    """Return whether `out` holds every file of a finished build with these settings."""
    stamp = out / BUILD_FILE
    complete = stamp.is_file() and all((out / name).is_file() for name in DATA_FILES)
    return complete and stamp.read_bytes() == settings.stamp().encode()


def build(out: Path, settings: Settings) -> str:
    """Build everything into `out` and return a summary of four lines.

    Raises:
        BuildError: This Python has too few docstrings.
    """
    pairs = build_pairs(seed=settings.seed)
    if len(pairs) < MIN_PAIRS:
        raise BuildError(
            f"got {len(pairs)} docstrings from {sysconfig.get_path('stdlib')}, need {MIN_PAIRS}: "
            "use a Python whose standard library is installed as .py sources"
        )
    train, heldout = split_pairs(pairs, settings.heldout, settings.seed)
    tokenizer = train_tokenizer(train, settings.vocab_size)
    _install(out, settings, train, heldout, tokenizer)
    encoded = tokenizer.encode_batch_fast([pretraining_text(pair) for pair in train])
    return (
        f"pairs       {len(train):,} train, {len(heldout):,} held out\n"
        f"tokens      {sum(len(item) for item in encoded):,} in the train text\n"
        f"vocabulary  {tokenizer.get_vocab_size():,}\n"
        f"where       {out}"
    )


def _install(
    out: Path,
    settings: Settings,
    train: Sequence[Pair],
    heldout: Sequence[Pair],
    tokenizer: Tokenizer,
) -> None:
    """Write beside `out`, then move file by file, so that no reader sees half a file."""
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".stdlib-data-") as name:
        staging = Path(name)
        write_files(staging, train, heldout, tokenizer)
        _write(staging / BUILD_FILE, settings.stamp())
        # The old stamp goes first and the new one comes last: an interrupted move is not a build.
        (out / BUILD_FILE).unlink(missing_ok=True)
        for file in (*DATA_FILES, BUILD_FILE):
            (staging / file).replace(out / file)
