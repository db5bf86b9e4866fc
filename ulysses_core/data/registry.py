"""Reads `dataset_info.json`: what each dataset's file is, and what its columns mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["INFO_FILE", "Columns", "DatasetSpec", "Tags", "find_datasets"]

INFO_FILE = "dataset_info.json"

_REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_UNSERVED_COLUMNS = ("tools", "images", "videos", "audios")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Columns(_Strict):
    """Name of the column that holds each part of an example; None where there is no such part."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    system: str | None = None
    messages: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


class Tags(_Strict):
    """Words that a ShareGPT conversation uses for its keys and roles."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


class _Entry(_Strict):
    file_name: str
    formatting: Literal["alpaca", "sharegpt"] = "alpaca"
    ranking: bool = False
    num_samples: int | None = Field(default=None, gt=0)
    split: Literal["train"] = "train"
    columns: Columns | None = None
    tags: Tags = Tags()


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of `dataset_info.json`."""

    name: str
    path: Path
    """A data file, or a folder of data files."""
    formatting: Literal["alpaca", "sharegpt"]
    ranking: bool
    """Rows hold a chosen and a rejected answer."""
    num_samples: int | None
    """Draw this many examples, with repetition once all are used."""
    columns: Columns
    columns_given: bool
    """Whether the entry names its columns. Those must exist; the defaults need not."""
    tags: Tags


def find_datasets(names: Sequence[str], dataset_dir: Path) -> list[DatasetSpec]:
    """Looks up datasets by name in `<dataset_dir>/dataset_info.json`.

    Raises:
        InputError: The folder, its `dataset_info.json`, a name or a data file is missing, or an
            entry asks for something that is not served.
    """
    if not names:
        return []
    info = _read_info(dataset_dir)
    return [_spec(name, info, dataset_dir) for name in names]


def _read_info(dataset_dir: Path) -> dict[str, object]:
    if not dataset_dir.is_dir():
        raise InputError(
            f"dataset_dir={str(dataset_dir)!r} is not a folder: "
            f"set it to the folder that holds {INFO_FILE}"
        )
    path = dataset_dir / INFO_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: dataset_dir must hold a {INFO_FILE} that lists its datasets"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(info, dict):
        raise InputError(f"{path} must hold one object, dataset name to description")
    return info


def _spec(name: str, info: dict[str, object], dataset_dir: Path) -> DatasetSpec:
    where = dataset_dir / INFO_FILE
    if name not in info:
        raise InputError(
            f"dataset {name!r} is not in {where}{nearest(name, info)}; "
            f"known: {', '.join(sorted(info)) or 'none'}"
        )
    entry = _entry(f"{where}, dataset {name!r}", info[name])
    path = dataset_dir / entry.file_name
    if not path.exists():
        raise InputError(
            f"{where}, dataset {name!r}: file_name={entry.file_name!r} does not exist ({path})"
        )
    return DatasetSpec(
        name=name,
        path=path,
        formatting=entry.formatting,
        ranking=entry.ranking,
        num_samples=entry.num_samples,
        columns=_columns(entry),
        columns_given=entry.columns is not None,
        tags=entry.tags,
    )


def _columns(entry: _Entry) -> Columns:
    # As in LLaMA-Factory, naming any column switches all the default names off.
    if entry.columns is None:
        return Columns(
            prompt="instruction", query="input", response="output", messages="conversations"
        )
    if entry.formatting == "sharegpt" and entry.columns.messages is None:
        return entry.columns.model_copy(update={"messages": "conversations"})
    return entry.columns


def _entry(where: str, value: object) -> _Entry:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object with a file_name")
    remote = [key for key in _REMOTE_KEYS if key in value]
    if remote:
        raise InputError(
            f"{where}: {remote[0]} is not served, only local files are: "
            "download the data and set file_name to it"
        )
    columns = value.get("columns")
    unserved = [key for key in _UNSERVED_COLUMNS if isinstance(columns, dict) and key in columns]
    if unserved:
        raise InputError(
            f"{where}: columns.{unserved[0]} is not served, only text conversations are; "
            f"allowed columns: {', '.join(Columns.model_fields)}"
        )
    try:
        return _Entry.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    loc = [str(part) for part in problem["loc"]]
    key = ".".join(loc)
    if problem["type"] == "missing":
        return f"{key} is missing: it names the data file, relative to dataset_dir"
    if problem["type"] == "extra_forbidden":
        owners: dict[str, type[_Strict]] = {"columns": Columns, "tags": Tags}
        known = owners.get(loc[0] if len(loc) > 1 else "", _Entry).model_fields
        return f"unknown key {key!r}{nearest(loc[-1], known)}; allowed: {', '.join(known)}"
    hint = ""
    if key == "formatting":
        hint = " (OpenAI-style messages are sharegpt with tags)"
    return f"{key}={problem['input']!r} is not allowed: {problem['msg']}{hint}"
