"""`ulysses check-data`: what a person and a program see of a data set's health."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Ulysses = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(make_world: Callable[[], Any], tmp_path: Path) -> Path:
    """The folder of the command, with data, a tokenizer and a config of stage sft."""
    made = make_world()
    for name in ("data", "tokenizer"):
        (made.path / name).rename(tmp_path / name)
    values = {
        "stage": "sft",
        "dataset": "pairs",
        "dataset_dir": "data",
        "template": "default",
        "cutoff_len": 256,
        "tokenizer_name_or_path": "tokenizer",
        "model_config": {"model_type": "llama"},
        "output_dir": "runs/sft",
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def add_rows(place: Path, *rows: dict[str, Any]) -> None:
    with (place / "data/pairs.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


SECRET = {"instruction": "say \x1b[31m", "input": "", "output": "hf_abcdefgh12345678 [bold]"}


def test_sound_data_ends_with_0_and_damage_with_1(ulysses: Ulysses, place: Path) -> None:
    code, out, error = ulysses("check-data", "sft.yaml")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "pairs: stage sft, template default"
    assert lines[2].split()[:2] == ["train", "120"]
    add_rows(place, SECRET)
    code, out, _ = ulysses("check-data", "sft.yaml")
    assert code == 1
    assert "serious  secrets: 1 of 121 (0.83%) rows hold a key, a token or credentials" in out
    assert "data/pairs.jsonl, line 121: a key or token of a known format" in out
    assert "abcdefgh" not in out
    assert "\x1b" not in out
    assert "\N{REPLACEMENT CHARACTER}" not in out


def test_a_key_of_the_config_is_overridden(ulysses: Ulysses, place: Path) -> None:
    _, out, _ = ulysses("check-data", "sft.yaml", "cutoff_len=20", "--json")
    assert json.loads(out)["splits"]["train"]["truncated"] == 120


def test_json_has_findings_numbers_and_what_was_not_checked(ulysses: Ulysses, place: Path) -> None:
    add_rows(place, SECRET, SECRET)
    code, out, error = ulysses("check-data", "sft.yaml", "--json")
    assert (code, error) == (1, "")
    found = json.loads(out)
    assert found["is_serious"]
    first = found["findings"][0]
    assert (first["check"], first["count"]) == ("secrets", 2)
    assert first["examples"][0].startswith("data/pairs.jsonl, line 121: ")
    assert "kto_balance" in found["skipped"]
    assert "eos_missing" in found["clean"]


def test_a_picture_is_written(ulysses: Ulysses, place: Path) -> None:
    add_rows(place, SECRET)
    assert ulysses("check-data", "sft.yaml", "--plot", "data.png")[0] == 1
    assert (place / "data.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=pears"], "did you mean 'pairs'"),
        (["template=defalt"], "did you mean 'default'"),
        (["stage=dpo"], "dataset 'pairs' holds conversations without preferences"),
        (["tokenizer_name_or_path=nowhere"], "tokenizer_name_or_path is 'nowhere'"),
        (["cutoff=3"], "cutoff"),
        (["dataset="], "dataset is not set"),
        (["--plot", "data.gif"], "check-data: plot is data.gif; expected a file named *.png"),
    ],
)
def test_wrong_input_is_one_line(
    ulysses: Ulysses, place: Path, overrides: list[str], message: str
) -> None:
    code, out, error = ulysses("check-data", "sft.yaml", *overrides)
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
