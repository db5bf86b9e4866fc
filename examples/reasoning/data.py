"""Makes the problems, a few worked examples, and a tokenizer of single characters.

A worked example adds two numbers from the right, with a carried step for each digit::

    47+85=   <think>7+5+0=12,4+8+1=13</think>132
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Sizes", "make_data", "work_out"]

CHARACTERS = "0123456789+=,"
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
TAGS = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many problems there are.

    Attributes:
        digits: of each of the two numbers.
        worked: problems with carried steps, for the cold start.
        problems: problems of which only the answer is known, for everything after it.
        heldout: problems that no phase trains on.
    """

    digits: int = 2
    worked: int = 200
    problems: int = 6000
    heldout: int = 300


def work_out(first: int, second: int) -> str:
    """Returns the carried steps and the sum.

    Example:
        >>> work_out(47, 85)
        '<think>7+5+0=12,4+8+1=13</think>132'
    """
    steps, carry, left, right = [], 0, first, second
    while left or right:
        total = left % 10 + right % 10 + carry
        steps.append(f"{left % 10}+{right % 10}+{carry}={total}")
        carry, left, right = total // 10, left // 10, right // 10
    return f"<think>{','.join(steps)}</think>{first + second}"


def make_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Writes three datasets, `dataset_info.json` and the tokenizer into `folder`."""
    draw = _draw(seed, sizes)
    heldout, worked, problems = (
        [next(draw) for _ in range(count)]
        for count in (sizes.heldout, sizes.worked, sizes.problems)
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "worked.jsonl", _rows(worked, with_steps=True))
    _write(folder / "problems.jsonl", _rows(problems, with_steps=False))
    _write(folder / "heldout.jsonl", _rows(heldout, with_steps=False))
    info = {name: {"file_name": f"{name}.jsonl"} for name in ("worked", "problems", "heldout")}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
    make_tokenizer(folder / "tokenizer")


def _draw(seed: int, sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Yields pairs of numbers, none of them twice."""
    random_numbers = random.Random(seed)  # noqa: S311 - problems, not secrets
    low, high = 10 ** (sizes.digits - 1), 10**sizes.digits - 1
    seen: set[tuple[int, int]] = set()
    while True:
        pair = (random_numbers.randint(low, high), random_numbers.randint(low, high))
        if pair not in seen:
            seen.add(pair)
            yield pair


def _rows(pairs: Sequence[tuple[int, int]], *, with_steps: bool) -> Iterator[dict[str, str]]:
    for first, second in pairs:
        answer = work_out(first, second) if with_steps else str(first + second)
        yield {"instruction": f"{first}+{second}=", "input": "", "output": answer}


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer(folder: Path) -> None:
    """Saves a tokenizer with a token for each character and each tag, and a chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, EOS, UNKNOWN, *CHARACTERS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.reasoning.data", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/reasoning"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="decides the problems")
    arguments = parser.parse_args()
    make_data(arguments.out, arguments.seed, Sizes())


if __name__ == "__main__":
    main()
