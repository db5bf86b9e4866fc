"""Reads one data file, lazily, as numbered rows; wrong content raises `InputError` with its place.

Each reader holds little more than a part of the file in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ulysses_monitor.common.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["READERS", "Numbered", "describe_type"]

Numbered = Iterator[tuple[int, dict[str, Any]]]
"""Rows and their numbers, from 1: lines in `.jsonl` and `.txt`, rows in other files."""

_CHUNK = 1 << 20  # characters of a JSON list that are read at a time
_ROWS = 1000
_BETWEEN = re.compile(r"[\s,]*")


def describe_type(value: object) -> str:
    """Returns the type of a value in JSON's words, or Python's for what JSON does not have."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _read_json(file: Path) -> Numbered:
    with file.open(encoding="utf-8-sig") as stream:
        start = stream.read(_CHUNK).lstrip()
        if not start:
            return
        if not start.startswith("["):
            _explain_json(file)
        for number, value in enumerate(_list_items(file, stream, start[1:]), start=1):
            if not isinstance(value, dict):
                problem = describe_type(value)
                raise InputError(f"{file}, row {number} is {problem}; expected an object")
            yield number, value


def _list_items(file: Path, stream: TextIO, text: str) -> Iterator[Any]:
    """Yields the items of a JSON list, of which `text` follows the bracket."""
    decode = json.JSONDecoder().raw_decode
    at, is_whole = 0, False
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty text
        if text.startswith("]", at):
            break
        try:
            value, end = decode(text, at)
        except json.JSONDecodeError:
            end = len(text)
        # At the end of what is read, a number or a literal may go on.
        if end < len(text) or is_whole:
            if is_whole and end == len(text):
                break
            yield value
            at = end
            continue
        more = stream.read(max(_CHUNK, len(text)))
        text, at, is_whole = text[at:] + more, 0, not more
    if not _ends_well(text[at:], stream):
        _explain_json(file)


def _ends_well(rest: str, stream: TextIO) -> bool:
    return rest.startswith("]") and not (rest[1:] + stream.read()).strip()


def _explain_json(file: Path) -> None:
    """Raises an `InputError` that says where a file is not a JSON list of objects."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}: not valid JSON: {error}; if it has one object on each line, name it .jsonl"
        ) from None
    raise InputError(f"{file} is {describe_type(content)}; expected a list of objects")


def _read_jsonl(file: Path) -> Numbered:
    for number, line in _lines(file):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
            raise InputError(f"{file}, line {number}: not valid JSON: {problem}") from None
        if not isinstance(value, dict):
            raise InputError(f"{file}, line {number} is {describe_type(value)}; expected an object")
        yield number, value


def _read_txt(file: Path) -> Numbered:
    for number, line in _lines(file):
        yield number, {"text": line}


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, numbered from 1."""
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line.rstrip("\n")


def _read_csv(file: Path) -> Numbered:
    import pandas as pd

    number = 0
    try:
        # Without these two arguments "007" becomes 7 and "NA" a missing value.
        with pd.read_csv(file, dtype=str, keep_default_na=False, chunksize=_ROWS) as frames:
            for frame in frames:
                for values in frame.to_dict(orient="records"):
                    number += 1
                    yield number, {str(key): value for key, value in values.items()}
    except pd.errors.EmptyDataError:
        return
    except pd.errors.ParserError as error:
        raise InputError(f"{file}: not valid CSV: {error}") from None


def _read_parquet(file: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as content:
            yield from _number(content.iter_batches(batch_size=_ROWS))
    except pa.ArrowInvalid as error:
        raise InputError(f"{file}: not valid Parquet: {error}") from None


def _read_arrow(file: Path) -> Numbered:
    import pyarrow as pa

    with pa.memory_map(str(file)) as content:
        try:
            batches = pa.ipc.open_stream(content)
        except pa.ArrowInvalid:
            batches = _open_arrow_file(file, content)
        yield from _number(batches)


def _open_arrow_file(file: Path, content: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(content)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file}: not valid Arrow: {error}") from None
    return (reader.get_batch(index) for index in range(reader.num_record_batches))


def _number(batches: Iterator[pa.RecordBatch]) -> Numbered:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            for values in batch.slice(start, _ROWS).to_pylist():
                number += 1
                yield number, values


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
}
"""The reader of each suffix."""
