"""What is read from dataset_info.json and data files, and what is said where they are wrong."""

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
from ulysses_monitor.common.errors import InputError

# `values` here is a row's dict, not a frame's array.
# ruff: noqa: PD011

ROW = {"instruction": "hi", "input": "", "output": "hello"}


def refused(config: DataConfig, stage: Any = "sft") -> str:
    """Returns the message of the error, which must be one line."""
    with pytest.raises(InputError) as caught:
        check_sources(config, stage)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused_rows(write_dataset: Callable[..., Path], rows: Any, **entry: Any) -> str:
    folder = write_dataset(rows, **entry)
    return refused(DataConfig(dataset="toy", dataset_dir=folder))


def test_an_entry_becomes_a_spec_with_default_columns(write_dataset: Callable[..., Path]) -> None:
    folder = write_dataset([ROW])
    [spec] = find_datasets(["toy"], folder)
    assert spec.path == folder / "toy.json"
    assert (spec.columns.prompt, spec.columns.query, spec.columns.response) == (
        "instruction",
        "input",
        "output",
    )
    assert not spec.columns_given


def test_naming_a_column_switches_the_default_names_off(write_dataset: Callable[..., Path]) -> None:
    [spec] = find_datasets(["toy"], write_dataset([ROW], columns={"prompt": "instruction"}))
    assert spec.columns.prompt == "instruction"
    assert spec.columns.query is None
    assert spec.columns.response is None


def test_no_dataset_is_refused() -> None:
    assert "no dataset is set" in refused(DataConfig())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    message = refused(DataConfig(dataset="toy", dataset_dir=tmp_path / "nowhere"))
    assert "nowhere' is not a folder" in message
    assert "dataset_info.json" in message


def test_a_missing_or_broken_info_file_is_named(tmp_path: Path) -> None:
    config = DataConfig(dataset="toy", dataset_dir=tmp_path)
    assert f"{tmp_path / 'dataset_info.json'} does not exist" in refused(config)
    (tmp_path / "dataset_info.json").write_text("{'toy': 1}")
    assert "cannot be read as JSON" in refused(config)
    (tmp_path / "dataset_info.json").write_text("[]")
    assert "must hold one object" in refused(config)
    (tmp_path / "dataset_info.json").write_text('{"toy": "toy.json"}')
    assert "must be an object with a file_name" in refused(config)


def test_an_unknown_dataset_names_the_nearest_and_the_known(
    write_dataset: Callable[..., Path],
) -> None:
    folder = write_dataset([ROW], name="alpaca_en")
    message = refused(DataConfig(dataset="alpaca_em", dataset_dir=folder))
    assert "'alpaca_em'" in message
    assert "did you mean 'alpaca_en'?" in message
    assert "known: alpaca_en" in message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "org/data"}, "hf_hub_url is not served, only local files are"),
        ({"script_url": "script"}, "script_url is not served"),
        ({"cloud_file_name": "s3://x"}, "cloud_file_name is not served"),
        ({}, "file_name is missing"),
        ({"file_name": "none.json"}, "file_name='none.json' does not exist"),
        ({"file_name": "a.json", "formatting": "sharegtp"}, "formatting='sharegtp' is not allowed"),
        ({"file_name": "a.json", "formating": "alpaca"}, "did you mean 'formatting'?"),
        ({"file_name": "a.json", "columns": {"promt": "x"}}, "did you mean 'prompt'?"),
        ({"file_name": "a.json", "columns": {"images": "x"}}, "columns.images is not served"),
        ({"file_name": "a.json", "tags": {"rol_tag": "x"}}, "did you mean 'role_tag'?"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples=0 is not allowed"),
    ],
)
def test_a_wrong_entry_says_what_is_wrong(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"toy": entry}))
    (tmp_path / "a.json").write_text(json.dumps([ROW]))
    said = refused(DataConfig(dataset="toy", dataset_dir=tmp_path))
    assert "dataset 'toy'" in said
    assert message in said


@pytest.mark.parametrize(
    ("file_name", "raw", "message"),
    [
        ("t.jsonl", '{"a": 1}\n\n{"a": }\n', "t.jsonl, line 3 is not valid JSON: Expecting value"),
        ("t.jsonl", '{"a": 1}\n[1]\n', "t.jsonl, line 2 is a list, an object is needed"),
        ("t.jsonl", "\n", "t.jsonl holds no rows"),
        ("t.json", "", "t.json holds no rows"),
        ("t.json", "[]", "t.json holds no rows"),
        ("t.json", '{"a": 1}', "t.json holds an object, a list of objects is needed"),
        ("t.json", '[{"a": 1}, null]', "t.json, row 2 is null, an object is needed"),
        ("t.json", '{"a": 1}\n{"a": 2}', "must be named .jsonl"),
        ("t.csv", "", "t.csv holds no rows"),
        ("t.csv", 'a,b\n"1,2\n', "t.csv is not valid CSV"),
        ("t.parquet", "text", "t.parquet is not valid parquet"),
        ("t.xml", "<a/>", "no known suffix, got '.xml'; allowed: .json, .jsonl"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, file_name: str, raw: str, message: str) -> None:
    file = tmp_path / file_name
    file.write_text(raw)
    with pytest.raises(InputError, match=re.escape(message)):
        read_rows(file)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path / "t.jsonl")


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
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


def test_a_text_file_has_one_document_a_line_and_skips_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("first\n\n second \n")
    rows = read_rows(tmp_path / "t.txt")
    assert [row.values["text"] for row in rows] == ["first", " second "]
    assert rows[1].where.endswith("t.txt, line 3")


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"a": 2}')
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    (tmp_path / "notes.md").write_text("not data")
    assert [row.values["a"] for row in read_rows(tmp_path)] == [1, 2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no data file"):
        read_rows(tmp_path / "empty")


def test_sources_are_counted(write_dataset: Callable[..., Path]) -> None:
    write_dataset([ROW, ROW], name="a")
    folder = write_dataset([ROW], name="b")
    config = DataConfig(dataset="a", eval_dataset="b,a", dataset_dir=folder)
    assert check_sources(config) == {"a": 2, "b": 1}


def test_an_unknown_template_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    message = refused(DataConfig(dataset="toy", template="qwen33", dataset_dir=tmp_path))
    assert "did you mean 'qwen3'?" in message


@pytest.mark.parametrize(
    ("rows", "entry", "message"),
    [
        ([ROW, {"output": "x"}], {}, "row 2: column 'instruction' (prompt) is missing"),
        ([{"instruction": "x"}], {}, "row 1: column 'output' (response) is missing"),
        ([{**ROW, "output": None}], {}, "column 'output' (response) is null"),
        ([{**ROW, "output": "a\ud800"}], {}, "surrogates not allowed at character 1"),
        ([{**ROW, "output": 3}], {}, "column 'output' is int, a string is needed"),
        ([ROW], {"columns": {"prompt": "instruction"}}, "names no response column"),
        (
            [ROW],
            {"columns": {"prompt": "instruction", "response": "reply"}},
            "has no column 'reply', which dataset_info.json names as toy.columns.response; "
            "columns: input, instruction, output",
        ),
        (
            [{"q": "x", "a": "y", "h": [["only one"]]}],
            {"columns": {"prompt": "q", "response": "a", "history": "h"}},
            "column 'h' (history), entry 1 must be [prompt, answer]",
        ),
        (
            [{"q": "x", "a": "y", "h": "text"}],
            {"columns": {"prompt": "q", "response": "a", "history": "h"}},
            "must be a list of [prompt, answer] pairs",
        ),
        ([ROW], {"ranking": True}, "preference dataset (ranking: true): it needs stage dpo or rm"),
        (
            [{"q": "x", "a": "y", "k": True}],
            {"columns": {"prompt": "q", "response": "a", "kto_tag": "k"}},
            "it needs stage kto",
        ),
    ],
)
def test_a_wrong_alpaca_row_says_where(
    write_dataset: Callable[..., Path], rows: Any, entry: dict[str, Any], message: str
) -> None:
    said = refused_rows(write_dataset, rows, **entry)
    assert message in said
    assert "toy" in said


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"conversations": [{"from": tag, "value": value} for tag, value in pairs]}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": []}], "column 'conversations' (messages) is missing"),
        ([{"conversations": []}], "must be a list of turns"),
        ([{"conversations": ["hi"]}], "turn 1 must be an object with 'from', 'value'"),
        (turns(("human", 3)), "turn 1 needs a string under 'value'"),
        (turns(("human", "q"), ("bot", "a")), "turn 2 has from='bot'; allowed: human, gpt, obs"),
        (turns(("human", "q")), "ends with a user turn"),
        (turns(("system", "s")), "has no turns"),
        (turns(("gpt", "a"), ("human", "q")), "turn 1 is 'assistant', user or observation must"),
        (turns(("system", "s"), ("human", "q"), ("human", "q")), "turn 3 is 'user', assistant or"),
        (turns(("human", "q"), ("function_call", "f(x)")), "turn 2 (function_call) is not a JSON"),
        (turns(("human", "q"), ("function_call", '{"f": 1}')), "needs the keys name and arguments"),
    ],
)
def test_a_wrong_sharegpt_row_says_where(
    write_dataset: Callable[..., Path], rows: Any, message: str
) -> None:
    said = refused_rows(write_dataset, rows, formatting="sharegpt")
    assert message in said
    assert "toy.json, row 1: " in said


def test_pt_does_not_read_conversations(write_dataset: Callable[..., Path]) -> None:
    folder = write_dataset(turns(("human", "q"), ("gpt", "a")), formatting="sharegpt")
    message = refused(DataConfig(dataset="toy", dataset_dir=folder), "pt")
    assert "stage pt reads documents" in message


def test_checking_sources_loads_no_heavy_library(write_dataset: Callable[..., Path]) -> None:
    folder = write_dataset([ROW])
    root = Path(__file__).parents[3]
    # Bare parent packages: what those load by themselves is not this package's doing.
    code = f"""
import sys, types
for name in ("ulysses_core", "ulysses_monitor"):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [{str(root)!r} + "/" + name]
from ulysses_core.data import CausalCollator, DataConfig, check_sources
print(check_sources(DataConfig(dataset="toy", dataset_dir={str(folder)!r})))
print({{"torch", "transformers", "datasets", "pandas"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.splitlines() == ["{'toy': 1}", "set()"]
