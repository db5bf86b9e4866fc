"""Reading dataset_info.json and data files, and the errors about wrong ones."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ulysses_core.data import DataConfig, check_sources
from ulysses_core.data.files import read_rows
from ulysses_core.data.registry import find_datasets
from ulysses_core.trainers.stage import find_stage
from ulysses_monitor.common.errors import InputError

# `values` here is a row's dict, not a frame's array.
# ruff: noqa: PD011

ROW = {"instruction": "hi", "input": "", "output": "hello"}


def refuse(config: DataConfig, stage: Any = "sft") -> str:
    """Returns the message of the error, which must be one line."""
    with pytest.raises(InputError) as caught:
        check_sources(config, find_stage(stage))
    message = str(caught.value)
    assert "\n" not in message
    return message


def refuse_rows(write_dataset: Callable[..., Path], rows: Any, **entry: Any) -> str:
    folder = write_dataset(rows, **entry)
    return refuse(DataConfig(dataset="toy", dataset_dir=folder))


def test_an_entry_becomes_a_spec_with_default_columns(write_dataset: Callable[..., Path]) -> None:
    folder = write_dataset([ROW])
    [spec] = find_datasets(["toy"], folder)
    assert spec.path == folder / "toy.json"
    assert (spec.columns.prompt, spec.columns.query, spec.columns.response) == (
        "instruction",
        "input",
        "output",
    )
    assert not spec.has_columns


def test_naming_a_column_disables_the_default_names(write_dataset: Callable[..., Path]) -> None:
    [spec] = find_datasets(["toy"], write_dataset([ROW], columns={"prompt": "instruction"}))
    assert spec.columns.prompt == "instruction"
    assert spec.columns.query is None
    assert spec.columns.response is None


def test_a_config_without_datasets_is_refuse() -> None:
    assert "dataset is not set" in refuse(DataConfig())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    message = refuse(DataConfig(dataset="toy", dataset_dir=tmp_path / "nowhere"))
    assert "nowhere', which is not a folder" in message
    assert "dataset_info.json" in message


def test_a_missing_or_broken_info_file_is_named(tmp_path: Path) -> None:
    config = DataConfig(dataset="toy", dataset_dir=tmp_path)
    assert f"{tmp_path / 'dataset_info.json'}: no such file" in refuse(config)
    (tmp_path / "dataset_info.json").write_text("{'toy': 1}")
    assert "not valid JSON" in refuse(config)
    (tmp_path / "dataset_info.json").write_text("[]")
    assert "not a JSON object" in refuse(config)
    (tmp_path / "dataset_info.json").write_text('{"toy": "toy.json"}')
    assert "expected an object with a file_name" in refuse(config)


def test_the_error_about_an_unknown_dataset_names_the_nearest_and_all_others(
    write_dataset: Callable[..., Path],
) -> None:
    folder = write_dataset([ROW], name="alpaca_en")
    message = refuse(DataConfig(dataset="alpaca_em", dataset_dir=folder))
    assert "'alpaca_em'" in message
    assert "did you mean 'alpaca_en'?" in message
    assert "allowed: alpaca_en" in message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "org/data"}, "hf_hub_url is not supported; download the data and set"),
        ({"script_url": "script"}, "script_url is not supported"),
        ({"cloud_file_name": "s3://x"}, "cloud_file_name is not supported"),
        ({}, "file_name is missing"),
        ({"file_name": "none.json"}, "file_name is 'none.json'; no such file"),
        (
            {"file_name": "a.json", "formatting": "sharegtp"},
            "formatting is 'sharegtp' (did you mean 'sharegpt'?); allowed: alpaca, sharegpt",
        ),
        ({"file_name": "a.json", "formating": "alpaca"}, "did you mean 'formatting'?"),
        ({"file_name": "a.json", "columns": {"promt": "x"}}, "did you mean 'prompt'?"),
        (
            {"file_name": "a.json", "columns": {"images": "x"}},
            "columns.images is not supported",
        ),
        ({"file_name": "a.json", "tags": {"rol_tag": "x"}}, "did you mean 'role_tag'?"),
        (
            {"file_name": "a.json", "num_samples": 0},
            "num_samples is 0; expected an integer above 0",
        ),
    ],
)
def test_the_error_about_an_entry_names_the_dataset_and_the_key(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"toy": entry}))
    (tmp_path / "a.json").write_text(json.dumps([ROW]))
    error = refuse(DataConfig(dataset="toy", dataset_dir=tmp_path))
    assert "dataset 'toy'" in error
    assert message in error


@pytest.mark.parametrize(
    ("file_name", "raw", "message"),
    [
        ("t.jsonl", '{"a": 1}\n\n{"a": }\n', "t.jsonl, line 3: not valid JSON: Expecting value"),
        ("t.jsonl", '{"a": 1}\n[1]\n', "t.jsonl, line 2 is a list; expected an object"),
        ("t.jsonl", "\n", "t.jsonl: no rows"),
        ("t.json", "", "t.json: no rows"),
        ("t.json", "[]", "t.json: no rows"),
        ("t.json", '{"a": 1}', "t.json is an object; expected a list of objects"),
        ("t.json", '[{"a": 1}, null]', "t.json, row 2 is null; expected an object"),
        ("t.json", '{"a": 1}\n{"a": 2}', "if it has one object on each line, name it .jsonl"),
        ("t.csv", "", "t.csv: no rows"),
        ("t.csv", 'a,b\n"1,2\n', "t.csv: not valid CSV"),
        ("t.parquet", "text", "t.parquet: not valid Parquet"),
        ("t.xml", "<a/>", "the suffix is '.xml'; allowed: .json, .jsonl"),
    ],
)
def test_the_error_about_a_damaged_file_says_where_it_is_damaged(
    tmp_path: Path, file_name: str, raw: str, message: str
) -> None:
    file = tmp_path / file_name
    file.write_text(raw)
    with pytest.raises(InputError, match=re.escape(message)):
        read_rows(file)


def test_a_file_that_is_not_utf8_is_refuse(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="cannot read it"):
        read_rows(tmp_path / "t.jsonl")


def test_every_file_type_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "007", "answer": "NA"}, {"prompt": "", "answer": 'a "b",\nc'}]
    frame = pd.DataFrame(rows)
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    for suffix in ("json", "jsonl", "csv", "parquet"):
        assert [row.values for row in read_rows(tmp_path / f"t.{suffix}")] == rows, suffix


def test_a_short_csv_line_has_empty_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\nx\n")
    assert read_rows(tmp_path / "t.csv")[0].values == {"a": "x", "b": ""}


def test_each_line_of_a_text_file_that_is_not_blank_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("first\n\n second \n")
    rows = read_rows(tmp_path / "t.txt")
    assert [row.values["text"] for row in rows] == ["first", " second "]
    assert rows[1].where.endswith("t.txt, line 3")


def test_all_data_files_of_a_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"a": 2}')
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    (tmp_path / "notes.md").write_text("not data")
    assert [row.values["a"] for row in read_rows(tmp_path)] == [1, 2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no data files in this folder"):
        read_rows(tmp_path / "empty")


def test_only_the_first_rows_of_a_dataset_are_looked_at(write_dataset: Callable[..., Path]) -> None:
    folder = write_dataset([*[ROW] * 1500, {}])
    check_sources(DataConfig(dataset="toy", dataset_dir=folder), find_stage("sft"))
    folder = write_dataset([ROW, {}])
    assert "row 2" in refuse(DataConfig(dataset="toy", dataset_dir=folder))


def test_a_large_json_list_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"a": "x" * (n % 7), "n": [n, {"b": n}]} for n in range(60)]
    monkeypatch.setattr("ulysses_core.data.readers._CHUNK", 16)
    for indent in (None, 2):
        (tmp_path / "t.json").write_text(json.dumps(rows, indent=indent))
        assert [row.values for row in read_rows(tmp_path / "t.json")] == rows
    (tmp_path / "t.json").write_text(json.dumps(rows)[:-1] + ', {"a": }]')
    with pytest.raises(InputError, match="not valid JSON: Expecting value"):
        read_rows(tmp_path / "t.json")


def test_an_unknown_template_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    message = refuse(DataConfig(dataset="toy", template="qwen33", dataset_dir=tmp_path))
    assert "did you mean 'qwen3'?" in message


@pytest.mark.parametrize(
    ("rows", "entry", "message"),
    [
        ([ROW, {"output": "x"}], {}, "row 2: column 'instruction' (prompt) is missing"),
        ([{"instruction": "x"}], {}, "row 1: column 'output' (response) is missing"),
        ([{**ROW, "output": None}], {}, "column 'output' (response) is null"),
        ([{**ROW, "output": "a\ud800"}], {}, "surrogates not allowed at character 1"),
        ([{**ROW, "output": 3}], {}, "column 'output' is a number; expected a string"),
        (
            [ROW],
            {"columns": {"prompt": "instruction"}},
            "does not name this dataset's response column",
        ),
        (
            [ROW],
            {"columns": {"prompt": "instruction", "response": "reply"}},
            "toy.json does not have; allowed: input, instruction, output",
        ),
        (
            [{"q": "x", "a": "y", "h": [["only one"]]}],
            {"columns": {"prompt": "q", "response": "a", "history": "h"}},
            "column 'h' (history), entry 1: expected two strings, [prompt, answer]",
        ),
        (
            [{"q": "x", "a": "y", "h": "text"}],
            {"columns": {"prompt": "q", "response": "a", "history": "h"}},
            "expected a list of [prompt, answer] pairs",
        ),
        ([ROW], {"ranking": True}, "preference dataset (ranking: true), for stages dpo and rm"),
        (
            [{"q": "x", "a": "y", "k": True}],
            {"columns": {"prompt": "q", "response": "a", "kto_tag": "k"}},
            "for stage kto",
        ),
    ],
)
def test_the_error_about_an_alpaca_row_names_the_row_or_the_column(
    write_dataset: Callable[..., Path], rows: Any, entry: dict[str, Any], message: str
) -> None:
    error = refuse_rows(write_dataset, rows, **entry)
    assert message in error
    assert "toy" in error


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"conversations": [{"from": tag, "value": value} for tag, value in pairs]}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": []}], "column 'conversations' (messages) is missing"),
        ([{"conversations": []}], "is an empty list; expected a list of turns"),
        ([{"conversations": ["hi"]}], "turn 1 is a string; expected an object with 'from' and 'v"),
        (turns(("human", 3)), "turn 1 has no string under 'value'"),
        (turns(("human", "q"), ("bot", "a")), "turn 2: from is 'bot'; allowed: human, gpt, obs"),
        (turns(("human", "q")), "ends with a user turn"),
        (turns(("system", "s")), "has no turns"),
        (turns(("gpt", "a"), ("human", "q")), "of turn 1 is 'assistant'; expected user or obs"),
        (turns(("system", "s"), ("human", "q"), ("human", "q")), "of turn 3 is 'user'; expected"),
        (turns(("human", "q"), ("function_call", "f(x)")), "turn 2 (function_call) is not a JSON"),
        (turns(("human", "q"), ("function_call", '{"f": 1}')), "the keys name and arguments"),
    ],
)
def test_the_error_about_a_sharegpt_row_names_the_turn(
    write_dataset: Callable[..., Path], rows: Any, message: str
) -> None:
    error = refuse_rows(write_dataset, rows, formatting="sharegpt")
    assert message in error
    assert "toy.json, row 1: " in error


def test_stage_pt_refuses_conversations(write_dataset: Callable[..., Path]) -> None:
    folder = write_dataset(turns(("human", "q"), ("gpt", "a")), formatting="sharegpt")
    message = refuse(DataConfig(dataset="toy", dataset_dir=folder), "pt")
    assert "stage pt reads documents" in message


def test_checking_data_imports_no_heavy_library(write_dataset: Callable[..., Path]) -> None:
    folder = write_dataset([ROW])
    root = Path(__file__).parents[3]
    # Bare parent packages, because their own imports are not under test.
    code = f"""
import sys, types
for name in ("ulysses_core", "ulysses_monitor"):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [{str(root)!r} + "/" + name]
from ulysses_core.data import CausalCollator, DataConfig, check_sources
from ulysses_core.trainers.stage import find_stage
check_sources(DataConfig(dataset="toy", dataset_dir={str(folder)!r}), find_stage("sft"))
print({{"torch", "transformers", "datasets", "pandas"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.splitlines() == ["set()"]
