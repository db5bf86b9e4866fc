"""The command line; see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .build import MIN_VOCAB, BuildError, Settings, build, is_built


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    settings = Settings(
        seed=arguments.seed, vocab_size=arguments.vocab_size, heldout=arguments.heldout
    )
    try:
        if is_built(out, settings) and not arguments.force:
            print(f"{out} already holds this build; --force builds it again")
            return 0
        print(build(out, settings))
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.stdlib_data",
        description="Build training data from Python's docstrings.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="decides the wordings and the split")
    parser.add_argument(
        "--vocab-size", type=_vocab_size, default=2048, help="size of the tokenizer's vocabulary"
    )
    parser.add_argument("--heldout", type=_share, default=0.05, help="share to hold out")
    parser.add_argument("--force", action="store_true", help="build again even if it is there")
    return parser


def _vocab_size(text: str) -> int:
    if (value := int(text)) < MIN_VOCAB:
        raise argparse.ArgumentTypeError(f"got {value}, needs {MIN_VOCAB} or more")
    return value


def _share(text: str) -> float:
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {value}, needs a share between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
