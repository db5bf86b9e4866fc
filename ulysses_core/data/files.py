"""Reads rows from data files and saved datasets; errors name the file and the line or row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulysses_core.data.readers import READERS, describe_type
from ulysses_monitor.common.errors import InputError

__all__ = ["SUFFIXES", "Row", "describe_type", "iterate_rows", "list_files", "read_rows"]

SUFFIXES = tuple(READERS)
"""Suffixes of the data files that can be read."""
_SAVED = ("state.json", "dataset_dict.json")
"""What `datasets` writes into a folder with `save_to_disk`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file, and where it is in the file."""

    values: dict[str, Any]
    file: Path
    number: int
    """Counts from 1: lines in `.jsonl` and `.txt`, rows in other files."""

    @property
    def where(self) -> str:
        """Where the row is, for error messages, such as `data/a.jsonl, line 3`."""
        unit = "line" if self.file.suffix.lower() in (".jsonl", ".txt") else "row"
        return f"{self.file}, {unit} {self.number}"


def read_rows(path: Path) -> list[Row]:
    """Reads all rows; see `iterate_rows`."""
    return list(iterate_rows(path))


def iterate_rows(path: Path, split: str = "train") -> Iterator[Row]:
    """Yields the rows of a file, or of a folder, holding few of them in memory.

    Args:
        path: A data file; a folder that `save_to_disk` of `datasets` wrote; or a folder of data
            files, which are read in the order of their names.
        split: The split of a saved dataset with several.

    Raises:
        InputError: The file is empty, damaged or of an unknown type, the folder has no data files,
            or a saved dataset has no such split.
    """
    if _is_saved(path):
        yield from _iterate_saved(path, split)
        return
    if split != "train":
        raise InputError(
            f"{path}: split is {split!r}; allowed: train, because only a folder that "
            "save_to_disk wrote has several splits"
        )
    for file in list_files(path):
        yield from _iterate_file(file)


def list_files(path: Path) -> list[Path]:
    """Returns the data files of a path.

    Raises:
        InputError: The folder has no data files.
    """
    if not path.is_dir():
        return [path]
    if _is_saved(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{path}: no data files in this folder; allowed: {', '.join(SUFFIXES)}")
    return files


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def _iterate_saved(path: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises whatever its files make it raise
        line = str(error).split("\n", 1)[0]
        raise InputError(f"{path}: cannot load the saved dataset: {line}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise InputError(f"{path}: split is {split!r}; allowed: {', '.join(saved)}")
        saved = saved[split]
    if not len(saved):
        raise InputError(f"{path}: no rows; expected at least one")
    for number, values in enumerate(saved, start=1):
        yield Row(values, path, number)


def _iterate_file(file: Path) -> Iterator[Row]:
    read = READERS.get(file.suffix.lower())
    if read is None:
        raise InputError(f"{file}: the suffix is {file.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    count = 0
    try:
        for number, values in read(file):
            count += 1
            yield Row(values, file, number)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot read it: {error}") from None
    if not count:
        raise InputError(f"{file}: no rows; expected at least one")
