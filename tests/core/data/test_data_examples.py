from pathlib import Path
from typing import Any

from ulysses_core.data.examples import Example, Message, to_document, to_example
from ulysses_core.data.files import Row
from ulysses_core.data.registry import Columns, DatasetSpec, Tags

ALPACA = Columns(prompt="instruction", query="input", response="output")


def spec(columns: Columns = ALPACA, **changes: Any) -> DatasetSpec:
    settings: dict[str, Any] = {
        "name": "toy",
        "path": Path("toy.json"),
        "formatting": "alpaca",
        "split": "train",
        "ranking": False,
        "num_samples": None,
        "columns": columns,
        "has_columns": columns is not ALPACA,
        "tags": Tags(),
    }
    return DatasetSpec(**(settings | changes))


def row(**values: Any) -> Row:
    return Row(values, Path("toy.json"), 1)


def pairs(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


def test_alpaca_joins_prompt_and_query_with_a_newline() -> None:
    example = to_example(row(instruction="add", input="1 2", output="3"), spec())
    assert example.messages == (Message("user", "add\n1 2"), Message("assistant", "3"))
    assert example.where == "toy.json, row 1"


def test_null_empty_and_absent_queries_are_left_out() -> None:
    for query in ({"input": None}, {"input": ""}, {}):
        example = to_example(row(instruction="add", output="3", **query), spec())
        assert example.messages[0] == Message("user", "add")


def test_alpaca_reads_system_and_history() -> None:
    columns = Columns(prompt="q", response="a", system="s", history="h")
    example = to_example(row(q="3", a="4", s="be brief", h=[["1", "2"]]), spec(columns))
    assert example.system == "be brief"
    assert pairs(example) == [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    assert len(to_example(row(q="3", a="4", s=None, h=None), spec(columns)).messages) == 2


def test_sharegpt_reads_roles_and_the_system_turn() -> None:
    call = '{"name": "f", "arguments": {}}'
    turns = [("system", "s"), ("human", "q"), ("function_call", call), ("observation", "1")]
    turns.append(("gpt", "a"))
    values = [{"from": tag, "value": value} for tag, value in turns]
    example = to_example(
        row(conversations=values, system="column"),
        spec(Columns(messages="conversations", system="system"), formatting="sharegpt"),
    )
    assert example.system == "s"
    assert pairs(example) == [
        ("user", "q"),
        ("function", call),
        ("observation", "1"),
        ("assistant", "a"),
    ]


def test_openai_messages_are_sharegpt_with_tags() -> None:
    tags = Tags(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
    values = [("system", "s"), ("user", "q"), ("assistant", "a")]
    example = to_example(
        row(messages=[{"role": role, "content": content} for role, content in values]),
        spec(Columns(messages="messages"), formatting="sharegpt", tags=tags),
    )
    assert (example.system, pairs(example)) == ("s", [("user", "q"), ("assistant", "a")])


def test_a_document_is_the_prompt_column() -> None:
    assert to_document(row(body="text", other="x"), spec(Columns(prompt="body"))) == "text"


def test_a_text_column_is_the_document_where_no_columns_are_named() -> None:
    assert to_document(row(text="words"), spec()) == "words"
    assert to_document(row(instruction="a", input="b", text="c"), spec()) == "a\nb"
