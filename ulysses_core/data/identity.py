"""What tokenised rows were made with: two equal identities mean equal rows."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_core.data.config import DataConfig
from ulysses_core.data.files import list_files
from ulysses_core.data.registry import DatasetSpec, find_datasets
from ulysses_core.data.sources import RowPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DATASET_KEYS", "describe_rows", "hash_json"]

_NOT_IN_ROWS = {
    "buffer_size",
    "data_shared_file_system",
    "dataset_dir",
    "ignore_pad_token_for_loss",
    "overwrite_cache",
    "preprocessing_batch_size",
    "streaming",
    "tokenized_path",
}
"""Settings that do not change a row."""

DATASET_KEYS = (
    "dataset",
    "eval_dataset",
    "eval_on_each_dataset",
    "interleave_probs",
    "max_samples",
    "mix_strategy",
    "val_size",
    "bad_rows",
)
"""Settings that choose rows, which a config without `dataset` leaves to the tokenised rows."""


def describe_rows(
    config: DataConfig, plan: RowPlan, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, Any]:
    """Returns, as JSON, everything that the rows of a config depend on.

    Returns:
        `settings`: what a user can change, by key; `tokenizer`: a hash of it; `sources`: the files
        with their sizes and times; `code`: a hash of the modules that make rows.
    """
    settings = config.model_dump(mode="json", exclude=_NOT_IN_ROWS)
    specs = find_datasets([*config.dataset, *config.eval_dataset], config.dataset_dir)
    return {
        "settings": {"stage": plan.name, **settings},
        "tokenizer": _hash_tokenizer(tokenizer),
        "seed": seed,
        "sources": [_describe_source(spec) for spec in specs],
        "code": _hash_code(plan),
    }


def hash_json(value: object) -> str:
    """Returns a hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _describe_source(spec: DatasetSpec) -> dict[str, Any]:
    entry = {field.name: str(getattr(spec, field.name)) for field in fields(spec)}
    stats = [(file, file.stat()) for file in list_files(spec.path)]
    files = [[str(file.absolute()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return {"entry": entry, "files": files}


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return hash_json(
        [
            type(tokenizer).__name__,
            content,
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
            getattr(tokenizer, "add_bos_token", None),
        ]
    )


def _hash_code(plan: RowPlan) -> str:
    import tokenizers

    owners = {function.__module__ for function in (plan.convert, plan.tokenize)}
    files = [Path(sys.modules[name].__file__ or "") for name in sorted(owners)]
    files += sorted(Path(__file__).parent.glob("*.py"))
    return hash_json([tokenizers.__version__, *(_hash_file(file) for file in files)])


def _hash_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
