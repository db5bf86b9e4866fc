"""Build training data from the docstrings of the installed Python, with no network.

    python examples/build_stdlib_data.py --out data/stdlib

The standard library's sources are parsed, never imported. Each documented module, class,
function and method gives one question/answer pair and one pre-training text, about 6,000 of
each. A share is held out, and a byte-level BPE tokenizer is trained on the rest. The folder can
be used as `dataset_dir`: its `dataset_info.json` names `stdlib_qa`, `stdlib_qa_heldout`,
`stdlib_text` and `stdlib_text_heldout`.

The answers are text from Python's own sources, under the PSF licence of that installation.
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import json
import os
import platform
import random
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT_VERSION = 1
MIN_PAIRS = 3_000
MIN_CHARS, MAX_CHARS = 20, 2_000
PAD, BOS, EOS = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
# Every byte is a token of its own, so that any text can be written.
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

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "_bundled", "dist-packages", "idle_test", "pydoc_data", "site-packages"}
    | {"test", "tests"}
)
# Private files that hold the documented Python source of a public module.
PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
PROPERTY_DECORATORS = frozenset({"property", "cached_property", "functools.cached_property"})

QUESTIONS = {
    "module": (
        "What is the Python module `{name}` for?",
        "Give an overview of the `{name}` module.",
        "What does the standard library module `{name}` provide?",
        "Describe the module `{name}`.",
    ),
    "class": (
        "What is the class `{name}`?",
        "Describe the Python class `{name}`.",
        "What is `{name}` used for?",
        "Explain the class `{name}` from the standard library.",
    ),
    "property": (
        "What does the property `{name}` give?",
        "Describe the property `{name}`.",
        "What is `{name}`?",
    ),
    "special form": (
        "What is `{name}`?",
        "What does `{name}` mean?",
        "What is `{name}` used for?",
    ),
    "function": (
        "What does `{name}` do?",
        "Explain the {kind} `{name}`.",
        "How does `{name}` behave?",
        "Describe the Python {kind} `{name}`.",
        "What is `{name}` used for?",
    ),
}
QUESTIONS["method"] = QUESTIONS["function"]

# Paragraphs about who wrote a file, and version-control tags: nothing to learn from.
BANNER = re.compile(
    r"copyright \(?c|\(c\) copyright|all rights reserved|^\W*(written|cloned|contributed) by\b"
    r"|licensed to|\$(Id|Revision|Date)\b|under the terms of|licenses when using",
    re.IGNORECASE | re.MULTILINE,
)
# From such a line on, a docstring is a note of its authors to themselves.
AUTHORS_NOTE = re.compile(r"^\W*(XXX|TODO|FIXME)\b.*", re.MULTILINE | re.DOTALL)
# Whole docstrings without content: generated tables, and pointers to another docstring.
EMPTY_TALK = re.compile(
    r"character mapping codec|^see (the )?(base|parent|super)\S*( class)?\W*$"
    r"|^(internal|private)\b",
    re.IGNORECASE,
)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class BuildError(Exception):
    """The data cannot be built here; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One documented object as a question and its answer."""

    name: str
    """Qualified name, such as `json.dumps`."""
    heading: str
    """The name, and for a function its signature."""
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the content of a build."""

    seed: int = 0
    vocab_size: int = 2048
    heldout: float = 0.05
    """Share of the pairs that no training file and no tokenizer sees."""

    def stamp(self) -> str:
        """Text of `build.json`: equal stamps mean equal files."""
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


def stdlib_sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield `(module name, file)` for the public standard library under `root`, sorted."""
    found: list[tuple[str, Path]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [(_module_name(path.relative_to(root)), path) for path in paths]
    yield from sorted(item for item in found if _is_stdlib(item[0]))


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return PUBLIC_NAMES.get(name, name)


def _is_stdlib(module: str) -> bool:
    # The folder also holds files of the distribution or of the user, such as sitecustomize.py.
    return module.partition(".")[0] in sys.stdlib_module_names and _is_public(module)


def _is_public(name: str) -> bool:
    return all(not part.startswith("_") or part.endswith("__") for part in name.split("."))


def documented_objects(module: str, tree: ast.Module) -> Iterator[tuple[str, str, str, str]]:
    """Yield `(kind, name, heading, answer)` for what has a usable docstring in one module."""
    for kind, name, node in _walk(module, tree, inside_class=False):
        if not _is_public(name):
            continue
        if answer := clean_docstring(ast.get_docstring(node, clean=False) or ""):
            signature = _signature(node, kind) if isinstance(node, FunctionNode) else ""
            yield kind, name, name + signature, answer


def _walk(
    name: str, node: ast.Module | ast.ClassDef | FunctionNode, *, inside_class: bool
) -> Iterator[tuple[str, str, ast.Module | ast.ClassDef | FunctionNode]]:
    yield _kind(node, inside_class=inside_class), name, node
    if isinstance(node, FunctionNode):
        return  # what is defined inside a function cannot be reached by name
    for child in _definitions(node.body):
        yield from _walk(f"{name}.{child.name}", child, inside_class=isinstance(node, ast.ClassDef))


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.ClassDef | FunctionNode]:
    for statement in body:
        if isinstance(statement, ast.ClassDef | FunctionNode):
            yield statement
        elif isinstance(statement, ast.If | ast.Try):  # per platform, or where an import failed
            yield from _definitions(statement.body)
            for handler in getattr(statement, "handlers", ()):
                yield from _definitions(handler.body)
            yield from _definitions(statement.orelse)


def _kind(node: ast.AST, *, inside_class: bool) -> str:
    if not isinstance(node, FunctionNode):
        return "class" if isinstance(node, ast.ClassDef) else "module"
    if _decorators(node) & PROPERTY_DECORATORS:
        return "property"
    if any(name.endswith("SpecialForm") for name in _decorators(node)):
        return "special form"  # `typing.Optional` is written as a function, and is none
    return "method" if inside_class else "function"


def _decorators(node: FunctionNode) -> set[str]:
    return {ast.unparse(decorator) for decorator in node.decorator_list}


def _signature(node: FunctionNode, kind: str) -> str:
    """Return the arguments as a caller sees them: without `self`, and none for a property."""
    if kind not in {"function", "method"}:
        return ""
    arguments = copy.copy(node.args)
    if kind == "method" and "staticmethod" not in _decorators(node):
        field = "posonlyargs" if arguments.posonlyargs else "args"
        setattr(arguments, field, getattr(arguments, field)[1:])
    return f"({ast.unparse(arguments)})"


def clean_docstring(docstring: str) -> str:
    """Return the docstring without indentation and banners, or "" where it is of no use."""
    text = AUTHORS_NOTE.sub("", inspect.cleandoc(docstring))
    paragraphs = re.split(r"\n\s*\n", text)
    text = "\n\n".join(part for part in paragraphs if not BANNER.search(part)).strip()
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return text if _is_usable(text) else ""


def _is_usable(text: str) -> bool:
    printable = all(line.isprintable() for line in text.split("\n"))
    readable = printable and "\N{REPLACEMENT CHARACTER}" not in text
    in_range = MIN_CHARS <= len(text) <= MAX_CHARS
    return readable and in_range and not EMPTY_TALK.search(text) and _has_prose(text)


def _has_prose(text: str) -> bool:
    """Tell whether a third of the text, and three words, are outside doctests."""
    # A doctest is the prompt, and what follows it up to the next blank line.
    prose = re.sub(r"^[ ]*>>>.*(\n[ ]*\S.*)*", "", text, flags=re.MULTILINE)
    words = re.findall(r"[A-Za-z]{2,}", prose)
    return len(words) >= 3 and 3 * len(prose) >= len(text)


def build_pairs(root: Path | None = None, seed: int = 0) -> list[Pair]:
    """Return one pair for each documented object, in a fixed order, without repeated answers.

    Args:
        root: Folder with the standard library's sources; that of this Python where None.
        seed: Decides the wording of each question.
    """
    rng = random.Random(seed)  # noqa: S311 - wording, not secrets
    names: set[str] = set()
    answers: set[str] = set()
    pairs: list[Pair] = []
    for kind, name, heading, answer in _all_objects(root or Path(sysconfig.get_path("stdlib"))):
        key = _answer_key(answer)
        if name in names or key in answers:
            continue
        names.add(name)
        answers.add(key)
        question = rng.choice(QUESTIONS[kind]).format(kind=kind, name=heading)
        pairs.append(Pair(name=name, heading=heading, question=question, answer=answer))
    return pairs


def _all_objects(root: Path) -> Iterator[tuple[str, str, str, str]]:
    for module, path in stdlib_sources(root):
        try:
            tree = ast.parse(path.read_bytes())  # bytes: the file may declare its own encoding
        except (SyntaxError, ValueError):
            continue  # a template or broken sample that a distribution put there
        yield from documented_objects(module, tree)


def _answer_key(answer: str) -> str:
    # Copies of a docstring often differ in layout and punctuation only.
    return re.sub(r"\W+", " ", answer).strip().casefold()


def split_pairs(pairs: Sequence[Pair], heldout: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return `(train, held out)`, both in the order of `pairs`.

    A drawn pair whose answer also stands inside another text stays in train, so that no held-out
    answer can be read during training.
    """
    rng = random.Random(seed)  # noqa: S311 - a split, not secrets
    drawn = set(rng.sample(range(len(pairs)), round(heldout * len(pairs))))
    rest = "\n".join(_answer_key(p.answer) for i, p in enumerate(pairs) if i not in drawn)
    drawn = {i for i in drawn if _answer_key(pairs[i].answer) not in rest}
    train = [pair for i, pair in enumerate(pairs) if i not in drawn]
    return train, [pairs[i] for i in sorted(drawn)]


def pretraining_text(pair: Pair) -> str:
    """Return a heading line with the object's signature, then its docstring."""
    return f"{pair.heading}\n\n{pair.answer}"


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
        clean_up_tokenization_spaces=False,  # it would delete the blank before punctuation
    ).save_pretrained(folder)


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    _write(path, "".join(_json(row) for row in rows))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent) + "\n"


def is_built(out: Path, settings: Settings) -> bool:
    """Tell whether `out` holds every file of a finished build with these settings."""
    stamp = out / BUILD_FILE
    complete = stamp.is_file() and all((out / name).is_file() for name in DATA_FILES)
    return complete and stamp.read_bytes() == settings.stamp().encode()


def build(out: Path, settings: Settings) -> str:
    """Build everything into `out` and return a summary of four lines.

    Raises:
        BuildError: This Python comes with too few docstrings.
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
    """Write beside `out`, then move file by file, so that no reader meets half a file."""
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".stdlib-data-") as name:
        staging = Path(name)
        write_files(staging, train, heldout, tokenizer)
        _write(staging / BUILD_FILE, settings.stamp())
        # The stamp goes first and comes back last: an interrupted move is never taken as built.
        (out / BUILD_FILE).unlink(missing_ok=True)
        for file in (*DATA_FILES, BUILD_FILE):
            (staging / file).replace(out / file)


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
    parser = argparse.ArgumentParser(description="Build training data from Python's docstrings.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the wordings and the split")
    parser.add_argument("--vocab-size", type=_vocab_size, default=2048, help="of the tokenizer")
    parser.add_argument("--heldout", type=_share, default=0.05, help="share to hold out")
    parser.add_argument("--force", action="store_true", help="build even where it is built")
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
