from __future__ import annotations

import gc
import re

import pytest

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.sinks.csv_file import CsvSink
from ulysses_monitor.sinks.selection import EVERYTHING, Selection

NAMES = ("train/loss/total", "grad/norm/layer/0", "grad/norm/param/a/b", "lora/x/module/m", "odd")


def test_without_patterns_parameters_and_modules_are_left_out() -> None:
    names, index = Selection(None).of(Schema(NAMES))
    assert names == ["train/loss/total", "grad/norm/layer/0", "odd"]
    assert index.tolist() == [0, 1, 4]


def test_the_pattern_for_everything_selects_everything() -> None:
    assert Selection(EVERYTHING).of(Schema(NAMES))[0] == list(NAMES)


def test_patterns_add_up_and_keep_the_schemas_order() -> None:
    assert Selection(["lora/*", "train/*"]).of(Schema(NAMES))[1].tolist() == [0, 3]


def test_an_empty_list_selects_nothing() -> None:
    assert Selection([]).of(Schema(NAMES))[0] == []


def test_values_come_with_their_names() -> None:
    record = StepRecord.of(1, 0.0, {"a/b/total": 1.5, "a/b/param/p": 2.5})
    assert list(Selection(None).items(record)) == [("a/b/total", 1.5)]


def test_a_schema_is_searched_once_and_not_kept_alive() -> None:
    selection = Selection(None)
    schema = Schema(NAMES)
    assert selection.of(schema)[1] is selection.of(schema)[1]
    del schema
    gc.collect()
    assert len(selection._cache) == 0


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("train/*", "metrics is 'train/*'; expected a list of patterns, such as [train/*]"),
        (3, "metrics is 3; expected a list of patterns"),
        ({"a": 1}, "metrics is {'a': 1}; expected a list of patterns"),
        ([1], "metrics.0 is 1; expected text"),
    ],
)
def test_patterns_that_are_not_a_list_of_text_are_refused(patterns: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"sink csv: {message}")):
        CsvSink(metrics=patterns)  # type: ignore[arg-type]
