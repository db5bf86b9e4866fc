"""Tokenised rows on disk: one process writes them, every process maps them into memory.

A folder of rows has an Arrow file for each split, and `rows.json`, which names these files and says
what the rows were made with. It is written under another name and renamed, so a folder is whole or
absent. Rows that take the place of others come in files of other names, and `rows.json` changes at
once: readers have all of the old rows or all of the new ones, whoever writes meanwhile.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_core.data.stats import DataStats
from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

__all__ = [
    "DatasetPair",
    "Split",
    "as_dataset",
    "default_folder",
    "is_written",
    "open_rows",
    "read_description",
    "write_rows",
]

_FILE = "rows.json"
_WRITE = 1000  # rows of a record batch


@dataclass(frozen=True)
class Split:
    """The rows of a split, before they are written."""

    rows: pa.Table
    stats: DataStats


@dataclass(frozen=True)
class DatasetPair:
    """The rows to train on and to evaluate on; either may be None."""

    train: Dataset | IterableDataset | None
    eval: Dataset | dict[str, Dataset] | None
    """With `eval_on_each_dataset` the rows of each dataset by its name."""
    stats: dict[str, DataStats]
    """Statistics by split: `train`, and `eval` or `eval_<dataset>`. Empty for a stream."""


def as_dataset(split: Split) -> Dataset:
    """Returns a split's rows in memory."""
    import datasets

    return datasets.Dataset(split.rows)


def default_folder(identity: str) -> Path:
    """Returns where rows are kept if the config does not say: in the user's cache."""
    root = os.environ.get("ULYSSES_CACHE_DIR") or Path.home() / ".cache" / "ulysses"
    return Path(root) / "rows" / identity


def is_written(folder: Path) -> bool:
    """Returns whether a folder holds rows."""
    return (folder / _FILE).is_file()


def write_rows(folder: Path, splits: Mapping[str, Split], description: Mapping[str, Any]) -> None:
    """Writes splits into a folder; rows that it holds are replaced. Of two at once, the later wins.

    Raises:
        InputError: The folder cannot be written, or holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not is_written(folder):
        raise InputError(f"{folder}: it holds other files; set tokenized_path to another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{folder.name}.{socket.gethostname()}-"
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot write tokenised rows: {error}") from None
    try:
        _fill(made, splits, description)
        _publish(folder, made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _fill(folder: Path, splits: Mapping[str, Split], description: Mapping[str, Any]) -> None:
    import pyarrow as pa

    entries = {}
    for number, (name, split) in enumerate(splits.items()):
        file = f"rows-{folder.name[-8:]}-{number}.arrow"
        with (
            pa.OSFile(str(folder / file), "wb") as sink,
            pa.ipc.new_stream(sink, split.rows.schema) as writer,
        ):
            writer.write_table(split.rows, max_chunksize=_WRITE)
        entries[name] = {"file": file, "stats": asdict(split.stats)}
    content = {**description, "splits": entries}
    (folder / _FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _publish(folder: Path, made: Path) -> None:
    """Gives the content of `made` to `folder`, which is absent, empty or holds rows."""
    try:
        made.rename(folder)  # fails unless it is absent or empty
    except OSError:
        if not is_written(folder):
            raise
        with _locked(folder):
            before = _files(folder)
            for file in _files(made):
                (made / file).replace(folder / file)
            (made / _FILE).replace(folder / _FILE)
            for file in before:  # who has it open keeps it
                (folder / file).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process replaces the rows of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # without locks, files of rows may be left that nothing names
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _files(folder: Path) -> list[str]:
    """Returns the names of the files that hold the rows of a folder; none if it is damaged."""
    try:
        entries = read_description(folder)["splits"].values()
    except InputError:
        return []
    return [Path(str(entry["file"])).name for entry in entries]


def read_description(folder: Path) -> dict[str, Any]:
    """Returns what the rows in a folder were made with.

    Raises:
        InputError: The folder holds no rows, or its description is damaged.
    """
    try:
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: it holds no rows that this project tokenised ({_FILE} is missing); set "
            "tokenized_path to another folder, which the first run writes"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _FILE}: cannot read it: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("splits"), dict):
        raise InputError(f"{folder / _FILE}: it does not describe tokenised rows")
    return content


def open_rows(folder: Path) -> DatasetPair:
    """Opens the rows in a folder, mapped into memory.

    Raises:
        InputError: The folder or a file in it is missing or damaged.
    """
    while True:
        described = read_description(folder)
        try:
            return _open(folder, described)
        except InputError:
            # Others may have replaced the rows since; then their files are there.
            if read_description(folder) == described:
                raise


def _open(folder: Path, description: Mapping[str, Any]) -> DatasetPair:
    import datasets

    found, stats = {}, {}
    for name, entry in description["splits"].items():
        file = folder / Path(str(entry["file"])).name
        try:
            found[name] = datasets.Dataset.from_file(str(file))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot read the tokenised rows: {error}") from None
        stats[name] = DataStats(**entry["stats"])
    each = {name.removeprefix("eval_"): rows for name, rows in found.items() if name[:5] == "eval_"}
    return DatasetPair(found.get("train"), found.get("eval") or each or None, stats)
