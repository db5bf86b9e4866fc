"""Turns rows into examples, before tokenising: conversations for `sft`, documents for `pt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from ulysses_core.data.files import Row, describe_type
from ulysses_core.data.registry import INFO_FILE, DatasetSpec
from ulysses_core.data.tool_calls import parse_calls
from ulysses_monitor.common.errors import InputError

__all__ = ["Example", "Message", "Role", "check_spec", "to_document", "to_example"]

Role = Literal["user", "assistant", "observation", "function", "system"]

_PROMPT_ROLES: tuple[Role, Role] = ("user", "observation")
_ANSWER_ROLES: tuple[Role, Role] = ("assistant", "function")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation: each user or observation turn is followed by an assistant or function one."""

    system: str
    messages: tuple[Message, ...]
    where: str = field(default="", compare=False)
    """Where the row is in its file, for error messages."""


def check_spec(rows: Sequence[Row], spec: DatasetSpec, stage: str) -> None:
    """Checks that a dataset suits the stage and has the columns that its entry names.

    Raises:
        InputError: The dataset is for another stage, or a named column is in none of its rows.
    """
    if spec.ranking:
        raise InputError(
            f"dataset {spec.name!r} is a preference dataset (ranking: true), for stages dpo and "
            f"rm; stage is {stage}, so choose another dataset"
        )
    if spec.columns.kto_tag:
        raise InputError(
            f"dataset {spec.name!r} has a kto_tag column, for stage kto; stage is {stage}, so "
            "choose another dataset"
        )
    if stage == "pt" and spec.formatting != "alpaca":
        raise InputError(
            f"dataset {spec.name!r}: formatting is {spec.formatting!r}; expected 'alpaca', because "
            "stage pt reads documents from a prompt column"
        )
    if spec.has_columns:
        _check_columns(rows, spec)


def _check_columns(rows: Sequence[Row], spec: DatasetSpec) -> None:
    present: set[str] = set()
    for row in rows:
        present.update(row.values)
    # `dict` over a pydantic model gives (field, value) pairs.
    for part, column in dict(spec.columns).items():
        if column is not None and column not in present:
            raise InputError(
                f"{INFO_FILE}: {spec.name}.columns.{part} is {column!r}, which {spec.path} does "
                f"not have; allowed: {', '.join(sorted(present))}"
            )


def to_document(row: Row, spec: DatasetSpec) -> str:
    """Returns the document of a row: its prompt column, then its query column if it has one.

    Raises:
        InputError: The row lacks the column, or the column is not text.
    """
    columns = spec.columns
    if not spec.has_columns and columns.prompt not in row.values and "text" in row.values:
        document = _text(row, "text")
    else:
        document = _joined_prompt(row, spec)
    _check_unicode(row, document)
    return document


def to_example(row: Row, spec: DatasetSpec) -> Example:
    """Returns the conversation of a row.

    Raises:
        InputError: The row lacks a column, a column has the wrong type, or the turns do not
            alternate between prompt and answer.
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
        problem = f"{error.reason} at character {error.start}"
        _fail(row, f"a text is not valid Unicode ({problem}); remove that character")


def _text(row: Row, column: str | None) -> str:
    """Returns a column's text, which is empty if the column is missing or null."""
    value = row.values.get(column) if column else None
    if value is None:
        return ""
    if not isinstance(value, str):
        _fail(row, f"column {column!r} is {describe_type(value)}; expected a string")
    return value


def _require(row: Row, column: str | None, part: str) -> None:
    if column is None:
        _fail(row, f"{INFO_FILE} does not name this dataset's {part} column; add it to columns")
    if column not in row.values:
        present = ", ".join(row.values) or "none"
        _fail(row, f"column {column!r} ({part}) is missing; the row has: {present}")


def _joined_prompt(row: Row, spec: DatasetSpec) -> str:
    columns = spec.columns
    _require(row, columns.prompt, "prompt")
    return "\n".join(filter(None, (_text(row, columns.prompt), _text(row, columns.query))))


def _alpaca(row: Row, spec: DatasetSpec) -> list[Message]:
    response = spec.columns.response
    _require(row, response, "response")
    if row.values[str(response)] is None:
        _fail(row, f"column {response!r} (response) is null; expected a string")
    messages = [*_history(row, spec.columns.history)]
    messages.append(Message("user", _joined_prompt(row, spec)))
    messages.append(Message("assistant", _text(row, response)))
    return messages


def _history(row: Row, column: str | None) -> list[Message]:
    pairs = row.values.get(column) if column else None
    if pairs is None:
        return []
    if not isinstance(pairs, list):
        _fail(
            row,
            f"column {column!r} (history) is {describe_type(pairs)}; "
            "expected a list of [prompt, answer] pairs",
        )
    messages: list[Message] = []
    for number, pair in enumerate(pairs, start=1):
        match pair:
            case [str(prompt), str(answer)]:
                messages += [Message("user", prompt), Message("assistant", answer)]
            case _:
                _fail(
                    row,
                    f"column {column!r} (history), entry {number}: expected two strings, "
                    "[prompt, answer]",
                )
    return messages


def _sharegpt(row: Row, spec: DatasetSpec) -> tuple[str, list[Message]]:
    column = spec.columns.messages
    _require(row, column, "messages")
    turns = row.values[str(column)]
    if not isinstance(turns, list) or not turns:
        given = "an empty list" if turns == [] else describe_type(turns)
        _fail(row, f"column {column!r} (messages) is {given}; expected a list of turns")
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
        keys = f"{tags.role_tag!r} and {tags.content_tag!r}"
        _fail(row, f"turn {number} is {describe_type(turn)}; expected an object with {keys}")
    for key in (tags.role_tag, tags.content_tag):
        if not isinstance(turn.get(key), str):
            _fail(
                row,
                f"turn {number} has no string under {key!r}; add one, or name another key in "
                f"tags in {INFO_FILE}",
            )
    tag, content = turn[tags.role_tag], turn[tags.content_tag]
    if tag not in roles:
        _fail(row, f"turn {number}: {tags.role_tag} is {tag!r}; allowed: {', '.join(roles)}")
    if roles[tag] == "function":
        try:
            parse_calls(content)
        except ValueError as error:
            _fail(row, f"turn {number} ({tag}) is not a JSON function call: {error}")
    return Message(roles[tag], content)


def _check_turns(row: Row, messages: Sequence[Message], first: int) -> None:
    for index, message in enumerate(messages):
        allowed = _ANSWER_ROLES if index % 2 else _PROMPT_ROLES
        if message.role not in allowed:
            _fail(
                row,
                f"the role of turn {first + index} is {message.role!r}; expected "
                f"{' or '.join(allowed)}, because prompts and answers alternate",
            )
    if not messages or len(messages) % 2:
        given = f"ends with a {messages[-1].role} turn" if messages else "has no turns"
        _fail(row, f"the conversation {given}; expected it to end with assistant or function")
