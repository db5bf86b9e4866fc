"""Reads `dataset_info.json`, which names each dataset's file and the meaning of its columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.validation import describe_problem

__all__ = ["INFO_FILE", "Columns", "DatasetSpec", "Tags", "find_datasets"]

INFO_FILE = "dataset_info.json"

_REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_UNSUPPORTED_COLUMNS = ("images", "videos", "audios")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Columns(_Strict):
    """Names of the columns with the parts of an example; None if a part does not exist."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    system: str | None = None
    messages: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


class Tags(_Strict):
    """Names that a conversation uses for its keys and roles; ShareGPT's unless they are set."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


OPENAI_TAGS = Tags(
    role_tag="role",
    content_tag="content",
    user_tag="user",
    assistant_tag="assistant",
    observation_tag="tool",
)

Formatting = Literal["alpaca", "sharegpt", "openai"]


class _Entry(_Strict):
    file_name: str
    formatting: Formatting = "alpaca"
    ranking: bool = False
    num_samples: int | None = Field(default=None, gt=0)
    split: str = "train"
    subset: str | None = None
    folder: str | None = None
    columns: Columns | None = None
    tags: Tags | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One entry of `dataset_info.json`."""

    name: str
    path: Path
    """A data file, or a folder: of data files, or saved with `save_to_disk`."""
    split: str
    """The split of a saved dataset with several; other files have only `train`."""
    formatting: Formatting
    ranking: bool
    """Whether rows have a chosen and a rejected answer."""
    num_samples: int | None
    """Draw this many examples, repeating them once all are used."""
    columns: Columns
    has_columns: bool
    """Whether the entry names its columns. Named columns must exist; default ones need not."""
    tags: Tags


def find_datasets(names: Sequence[str], dataset_dir: Path) -> list[DatasetSpec]:
    """Looks up datasets by name in `<dataset_dir>/dataset_info.json`.

    Raises:
        InputError: The folder, its `dataset_info.json`, a name or a data file is missing, or an
            entry asks for something that is not supported.
    """
    if not names:
        return []
    info = _read_info(dataset_dir)
    return [_spec(name, info, dataset_dir) for name in names]


def _read_info(dataset_dir: Path) -> dict[str, object]:
    if not dataset_dir.is_dir():
        raise InputError(
            f"dataset_dir is {str(dataset_dir)!r}, which is not a folder; "
            f"expected the folder with {INFO_FILE}"
        )
    path = dataset_dir / INFO_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; set dataset_dir to a folder with a {INFO_FILE} that lists its "
            "datasets"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(info, dict):
        raise InputError(f"{path}: not a JSON object; expected dataset names and their entries")
    return info


def _spec(name: str, info: dict[str, object], dataset_dir: Path) -> DatasetSpec:
    where = dataset_dir / INFO_FILE
    if name not in info:
        raise InputError(
            f"dataset {name!r} is not in {where}{nearest(name, info)}; "
            f"allowed: {', '.join(sorted(info)) or 'none, the file is empty'}"
        )
    entry = _entry(f"{where}, dataset {name!r}", _use_local_path(info[name], dataset_dir))
    path = dataset_dir / entry.file_name
    for part in filter(None, (entry.subset, entry.folder)):
        path = path / part
    if not path.exists():
        raise InputError(
            f"{where}, dataset {name!r}: file_name is {entry.file_name!r}; no such file: {path}"
        )
    return DatasetSpec(
        name=name,
        path=path,
        split=entry.split,
        formatting=entry.formatting,
        ranking=entry.ranking,
        num_samples=entry.num_samples,
        columns=_columns(entry),
        has_columns=entry.columns is not None,
        tags=entry.tags or (OPENAI_TAGS if entry.formatting == "openai" else Tags()),
    )


def _use_local_path(value: object, dataset_dir: Path) -> object:
    """Returns an entry in which the path of a local dataset stands for the name of a remote one."""
    if not isinstance(value, dict):
        return value
    for key in _REMOTE_KEYS[:3]:
        path = value.get(key)
        if isinstance(path, str) and (dataset_dir / path).is_dir():
            return {**{k: v for k, v in value.items() if k not in _REMOTE_KEYS}, "file_name": path}
    return value


def _columns(entry: _Entry) -> Columns:
    # As in LLaMA-Factory, naming one column disables all default names.
    messages = "messages" if entry.formatting == "openai" else "conversations"
    if entry.columns is None:
        return Columns(prompt="instruction", query="input", response="output", messages=messages)
    if entry.formatting != "alpaca" and entry.columns.messages is None:
        return entry.columns.model_copy(update={"messages": messages})
    return entry.columns


def _entry(where: str, value: object) -> _Entry:
    if not isinstance(value, dict):
        raise InputError(f"{where}: not an object; expected an object with a file_name")
    remote = [key for key in _REMOTE_KEYS if key in value]
    if remote:
        raise InputError(
            f"{where}: {remote[0]} is not supported; download the data and set file_name instead"
        )
    columns = value.get("columns")
    unsupported = [k for k in _UNSUPPORTED_COLUMNS if isinstance(columns, dict) and k in columns]
    if unsupported:
        raise InputError(
            f"{where}: columns.{unsupported[0]} is not supported; "
            f"allowed: {', '.join(Columns.model_fields)}"
        )
    try:
        return _Entry.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {describe_problem(error, _Entry)}") from None
