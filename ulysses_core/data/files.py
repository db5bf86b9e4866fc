"""Reads rows from data files, and says exactly where a file is broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulysses_monitor.common.errors import InputError

__all__ = ["SUFFIXES", "Row", "read_rows"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file, with its place in it."""

    values: dict[str, Any]
    file: Path
    number: int
    """Counted from 1: the line in `.jsonl` and `.txt`, the row elsewhere."""

    @property
    def where(self) -> str:
        """Returns the place for a message, such as `data/a.jsonl, line 3`."""
        unit = "line" if self.file.suffix.lower() in (".jsonl", ".txt") else "row"
        return f"{self.file}, {unit} {self.number}"


def read_rows(path: Path) -> list[Row]:
    """Reads all rows of a file, or of the data files in a folder, by name.

    Raises:
        InputError: The file is empty, broken or of an unknown kind, or the folder has no data file.
    """
    return [row for file in _files(path) for row in _read_file(file)]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{path} holds no data file; allowed: {', '.join(SUFFIXES)}")
    return files


def _read_file(file: Path) -> list[Row]:
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise InputError(
            f"{file} has no known suffix, got {file.suffix!r}; allowed: {', '.join(SUFFIXES)}"
        )
    try:
        rows = [Row(values, file, number) for number, values in read(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if not rows:
        raise InputError(f"{file} holds no rows")
    return rows


def _read_json(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file} is not valid JSON: {error}; "
            "a file with one object on each line must be named .jsonl"
        ) from None
    if not isinstance(content, list):
        raise InputError(f"{file} holds {_kind(content)}, a list of objects is needed")
    for number, value in enumerate(content, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{file}, row {number} is {_kind(value)}, an object is needed")
        yield number, value


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(file):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
            raise InputError(f"{file}, line {number} is not valid JSON: {problem}") from None
        if not isinstance(value, dict):
            raise InputError(f"{file}, line {number} is {_kind(value)}, an object is needed")
        yield number, value


def _read_txt(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(file):
        yield number, {"text": line}


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, numbered from 1."""
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line.rstrip("\n")


def _read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pandas as pd

    try:
        # Text stays text: without these two, "007" turns into 7 and "NA" into a missing value.
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return
    except pd.errors.ParserError as error:
        raise InputError(f"{file} is not valid CSV: {error}") from None
    for number, values in enumerate(frame.to_dict(orient="records"), start=1):
        yield number, {str(key): value for key, value in values.items()}


def _read_parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file} is not valid parquet: {error}") from None
    yield from enumerate(table.to_pylist(), start=1)


def _kind(value: object) -> str:
    """Returns what a JSON value is, in JSON's own words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
SUFFIXES = tuple(_READERS)
"""Kinds of data file that are read."""
