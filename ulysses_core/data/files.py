"""Reads rows from data files; errors name the file and the line or row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulysses_monitor.common.errors import InputError

__all__ = ["SUFFIXES", "Row", "describe_type", "read_rows"]


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
    """Reads all rows of a file, or of all data files in a folder in the order of their names.

    Raises:
        InputError: The file is empty, damaged or of an unknown type, or the folder has no data
            files.
    """
    return [row for file in _list_files(path) for row in _read_file(file)]


def _list_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{path}: no data files in this folder; allowed: {', '.join(SUFFIXES)}")
    return files


def _read_file(file: Path) -> list[Row]:
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise InputError(f"{file}: the suffix is {file.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    try:
        rows = [Row(values, file, number) for number, values in read(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot read it: {error}") from None
    if not rows:
        raise InputError(f"{file}: no rows; expected at least one")
    return rows


def _read_json(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}: not valid JSON: {error}; if it has one object on each line, name it .jsonl"
        ) from None
    if not isinstance(content, list):
        raise InputError(f"{file} is {describe_type(content)}; expected a list of objects")
    for number, value in enumerate(content, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{file}, row {number} is {describe_type(value)}; expected an object")
        yield number, value


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(file):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
            raise InputError(f"{file}, line {number}: not valid JSON: {problem}") from None
        if not isinstance(value, dict):
            raise InputError(f"{file}, line {number} is {describe_type(value)}; expected an object")
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
        # Without these two arguments "007" becomes 7 and "NA" a missing value.
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return
    except pd.errors.ParserError as error:
        raise InputError(f"{file}: not valid CSV: {error}") from None
    for number, values in enumerate(frame.to_dict(orient="records"), start=1):
        yield number, {str(key): value for key, value in values.items()}


def _read_parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file}: not valid Parquet: {error}") from None
    yield from enumerate(table.to_pylist(), start=1)


def describe_type(value: object) -> str:
    """Returns the type of a value in JSON's words, or Python's for what JSON does not have."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
SUFFIXES = tuple(_READERS)
"""Suffixes of the data files that can be read."""
