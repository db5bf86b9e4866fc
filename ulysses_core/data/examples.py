"""Turns rows into examples: conversations for `sft`, documents for `pt`. No tokens here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from ulysses_core.data.files import Row
from ulysses_core.data.registry import INFO_FILE, DatasetSpec
from ulysses_core.data.tool_calls import parse_calls
from ulysses_monitor.common.errors import InputError

__all__ = ["Example", "Message", "Role", "check_spec", "to_document", "to_example"]

Role = Literal["user", "assistant", "observation", "function", "system"]

_ASKS: tuple[Role, Role] = ("user", "observation")
_ANSWERS: tuple[Role, Role] = ("assistant", "function")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation: user or observation turns, each answered by an assistant or function turn."""

    system: str
    messages: tuple[Message, ...]
    where: str = field(default="", compare=False)
    """Place of the row in its file, for messages."""


def check_spec(rows: Sequence[Row], spec: DatasetSpec, stage: str) -> None:
    """Checks that a dataset suits the stage, and that the columns it names are there.

    Raises:
        InputError: The dataset is for another stage, or a named column is in none of its rows.
    """
    if spec.ranking:
        raise InputError(
            f"dataset {spec.name!r} is a preference dataset (ranking: true): "
            f"it needs stage dpo or rm, not {stage}"
        )
    if spec.columns.kto_tag:
        raise InputError(
            f"dataset {spec.name!r} has a kto_tag column: it needs stage kto, not {stage}"
        )
    if stage == "pt" and spec.formatting != "alpaca":
        raise InputError(
            f"dataset {spec.name!r} has formatting {spec.formatting!r}: stage pt reads documents, "
            "from the prompt column of an alpaca dataset"
        )
    if spec.columns_given:
        _check_columns(rows, spec)


def _check_columns(rows: Sequence[Row], spec: DatasetSpec) -> None:
    present: set[str] = set()
    for row in rows:
        present.update(row.values)
    # `dict` over a pydantic model gives (field, value) pairs.
    for part, column in dict(spec.columns).items():
        if column is not None and column not in present:
            raise InputError(
                f"{spec.path} has no column {column!r}, which {INFO_FILE} names as "
                f"{spec.name}.columns.{part}; columns: {', '.join(sorted(present))}"
            )


def to_document(row: Row, spec: DatasetSpec) -> str:
    """Returns the document of a row: its prompt column, and its query column where it has one.

    Raises:
        InputError: The row lacks the column, or the column is not text.
    """
    columns = spec.columns
    if not spec.columns_given and columns.prompt not in row.values and "text" in row.values:
        document = _text(row, "text")
    else:
        document = _joined_prompt(row, spec)
    _check_unicode(row, document)
    return document


def to_example(row: Row, spec: DatasetSpec) -> Example:
    """Returns the conversation of a row.

    Raises:
        InputError: The row lacks a column, a column is not of the right kind, or the turns do not
            alternate between a question and its answer.
    """
    if spec.formatting == "alpaca":
        system, messages = _text(row, spec.columns.system), _alpaca(row, spec)
    else:
        system, messages = _sharegpt(row, spec)
    _check_unicode(row, system, *(message.content for message in messages))
    return Example(system, tuple(messages), row.where)


def _fail(row: Row, problem: str) -> NoReturn:
    raise InputError(f"{row.where}: {problem}")


def _check_unicode(row: Row, *texts: str) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        _fail(row, f"a text cannot be tokenised, {error.reason} at character {error.start}")


def _text(row: Row, column: str | None) -> str:
    """Returns a column's text; a missing or null one is empty."""
    value = row.values.get(column) if column else None
    if value is None:
        return ""
    if not isinstance(value, str):
        _fail(row, f"column {column!r} is {type(value).__name__}, a string is needed")
    return value


def _need(row: Row, column: str | None, part: str) -> None:
    if column is None:
        _fail(row, f"{INFO_FILE} names no {part} column for this dataset")
    if column not in row.values:
        present = ", ".join(row.values) or "none"
        _fail(row, f"column {column!r} ({part}) is missing; the row has: {present}")


def _joined_prompt(row: Row, spec: DatasetSpec) -> str:
    columns = spec.columns
    _need(row, columns.prompt, "prompt")
    return "\n".join(filter(None, (_text(row, columns.prompt), _text(row, columns.query))))


def _alpaca(row: Row, spec: DatasetSpec) -> list[Message]:
    response = spec.columns.response
    _need(row, response, "response")
    if row.values[str(response)] is None:
        _fail(row, f"column {response!r} (response) is null, an answer is needed")
    messages = [*_history(row, spec.columns.history)]
    messages.append(Message("user", _joined_prompt(row, spec)))
    messages.append(Message("assistant", _text(row, response)))
    return messages


def _history(row: Row, column: str | None) -> list[Message]:
    pairs = row.values.get(column) if column else None
    if pairs is None:
        return []
    if not isinstance(pairs, list):
        _fail(row, f"column {column!r} (history) must be a list of [prompt, answer] pairs")
    messages: list[Message] = []
    for number, pair in enumerate(pairs, start=1):
        match pair:
            case [str(prompt), str(answer)]:
                messages += [Message("user", prompt), Message("assistant", answer)]
            case _:
                _fail(
                    row,
                    f"column {column!r} (history), entry {number} must be [prompt, answer], "
                    "two strings",
                )
    return messages


def _sharegpt(row: Row, spec: DatasetSpec) -> tuple[str, list[Message]]:
    column = spec.columns.messages
    _need(row, column, "messages")
    turns = row.values[str(column)]
    if not isinstance(turns, list) or not turns:
        _fail(row, f"column {column!r} (messages) must be a list of turns with at least one answer")
    messages = [_message(row, spec, number, turn) for number, turn in enumerate(turns, start=1)]
    system = _text(row, spec.columns.system)
    if messages[0].role == "system":
        system = messages.pop(0).content
    _check_turns(row, messages, first=1 + len(turns) - len(messages))
    return system, messages


def _message(row: Row, spec: DatasetSpec, number: int, turn: object) -> Message:
    tags = spec.tags
    roles: dict[str, Role] = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "observation",
        tags.function_tag: "function",
        tags.system_tag: "system",
    }
    if not isinstance(turn, dict):
        _fail(row, f"turn {number} must be an object with {tags.role_tag!r}, {tags.content_tag!r}")
    for key in (tags.role_tag, tags.content_tag):
        if not isinstance(turn.get(key), str):
            _fail(row, f"turn {number} needs a string under {key!r} (tags rename it)")
    tag, content = turn[tags.role_tag], turn[tags.content_tag]
    if tag not in roles:
        _fail(row, f"turn {number} has {tags.role_tag}={tag!r}; allowed: {', '.join(roles)}")
    if roles[tag] == "function":
        try:
            parse_calls(content)
        except ValueError as error:
            _fail(row, f"turn {number} ({tag}) is not a JSON function call: {error}")
    return Message(roles[tag], content)


def _check_turns(row: Row, messages: Sequence[Message], first: int) -> None:
    for index, message in enumerate(messages):
        allowed = _ANSWERS if index % 2 else _ASKS
        if message.role not in allowed:
            _fail(
                row,
                f"turn {first + index} is {message.role!r}, {' or '.join(allowed)} must stand "
                "there: turns alternate between a question and its answer",
            )
    if not messages or len(messages) % 2:
        last = f"ends with a {messages[-1].role} turn" if messages else "has no turns"
        _fail(row, f"the conversation {last}, it must end with an assistant or function turn")
