"""Turns rows into examples, before tokenising: documents, conversations, preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from ulysses_core.data.files import Row, describe_type
from ulysses_core.data.registry import INFO_FILE, DatasetSpec
from ulysses_core.data.tool_calls import parse_calls
from ulysses_monitor.common.errors import InputError

__all__ = [
    "Example",
    "Message",
    "Pair",
    "Role",
    "Tagged",
    "to_document",
    "to_example",
    "to_pair",
    "to_tagged",
]

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


@dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations that differ in their last answer, of which the first is preferred."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True, slots=True)
class Tagged:
    """A conversation, and whether its last answer is desirable."""

    example: Example
    is_desirable: bool


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


def to_pair(row: Row, spec: DatasetSpec) -> Pair:
    """Returns the preferred and the rejected conversation of a row.

    In alpaca format the answers are the columns `chosen` and `rejected`. In ShareGPT format these
    hold one turn each, which answers the conversation in the messages column.

    Raises:
        InputError: As `to_example`; or an answer is missing or empty, or both are equal.
    """
    system, prompt = _prompt_of_pair(row, spec)
    answers = [_answer_of_pair(row, spec, part) for part in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        _fail(row, "the chosen and the rejected answer are equal; expected two different answers")
    _check_unicode(row, system, *(message.content for message in [*prompt, *answers]))
    chosen, rejected = (Example(system, (*prompt, answer), row.where) for answer in answers)
    return Pair(chosen, rejected)


def _prompt_of_pair(row: Row, spec: DatasetSpec) -> tuple[str, list[Message]]:
    if spec.formatting == "sharegpt":
        return _sharegpt(row, spec, needs_answer=False)
    prompt = [*_history(row, spec.columns.history), Message("user", _joined_prompt(row, spec))]
    return _text(row, spec.columns.system), prompt


def _answer_of_pair(row: Row, spec: DatasetSpec, part: str) -> Message:
    column: str | None = getattr(spec.columns, part)
    _require(row, column, part)
    value = row.values[str(column)]
    if spec.formatting == "sharegpt":
        answer = _message(row, spec, part, value)
    elif isinstance(value, str):
        answer = Message("assistant", value)
    else:
        _fail(row, f"column {column!r} ({part}) is {describe_type(value)}; expected a string")
    if answer.role not in _ANSWER_ROLES:
        _fail(row, f"the role of {part} is {answer.role!r}; expected {' or '.join(_ANSWER_ROLES)}")
    if not answer.content.strip():
        _fail(row, f"column {column!r} ({part}) is empty; expected an answer")
    return answer


def to_tagged(row: Row, spec: DatasetSpec) -> Tagged:
    """Returns the conversation of a row and its `kto_tag`.

    Raises:
        InputError: As `to_example`; or the tag is not a boolean, or the answer is empty.
    """
    column = spec.columns.kto_tag
    _require(row, column, "kto_tag")
    tag = row.values[str(column)]
    if not isinstance(tag, bool):
        _fail(row, f"column {column!r} (kto_tag) is {describe_type(tag)}; expected true or false")
    example = to_example(row, spec)
    if not example.messages[-1].content.strip():
        _fail(row, "the last answer is empty; expected an answer")
    return Tagged(example, tag)


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


def _sharegpt(
    row: Row, spec: DatasetSpec, *, needs_answer: bool = True
) -> tuple[str, list[Message]]:
    column = spec.columns.messages
    _require(row, column, "messages")
    turns = row.values[str(column)]
    if not isinstance(turns, list) or not turns:
        given = "an empty list" if turns == [] else describe_type(turns)
        _fail(row, f"column {column!r} (messages) is {given}; expected a list of turns")
    messages = [
        _message(row, spec, f"turn {number}", turn) for number, turn in enumerate(turns, start=1)
    ]
    system = _text(row, spec.columns.system)
    if messages[0].role == "system":
        system = messages.pop(0).content
    _check_turns(row, messages, 1 + len(turns) - len(messages), needs_answer)
    return system, messages


def _message(row: Row, spec: DatasetSpec, place: str, turn: object) -> Message:
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
        _fail(row, f"{place} is {describe_type(turn)}; expected an object with {keys}")
    for key in (tags.role_tag, tags.content_tag):
        if not isinstance(turn.get(key), str):
            _fail(
                row,
                f"{place} has no string under {key!r}; add one, or name another key in "
                f"tags in {INFO_FILE}",
            )
    tag, content = turn[tags.role_tag], turn[tags.content_tag]
    if tag not in roles:
        _fail(row, f"{place}: {tags.role_tag} is {tag!r}; allowed: {', '.join(roles)}")
    if roles[tag] == "function":
        try:
            parse_calls(content)
        except ValueError as error:
            _fail(row, f"{place} ({tag}) is not a JSON function call: {error}")
    return Message(roles[tag], content)


def _check_turns(row: Row, messages: Sequence[Message], first: int, needs_answer: bool) -> None:
    for index, message in enumerate(messages):
        allowed = _ANSWER_ROLES if index % 2 else _PROMPT_ROLES
        if message.role not in allowed:
            _fail(
                row,
                f"the role of turn {first + index} is {message.role!r}; expected "
                f"{' or '.join(allowed)}, because prompts and answers alternate",
            )
    if not messages or len(messages) % 2 == needs_answer:
        given = f"ends with a {messages[-1].role} turn" if messages else "has no turns"
        last = _ANSWER_ROLES if needs_answer else _PROMPT_ROLES
        _fail(row, f"the conversation {given}; expected it to end with {' or '.join(last)}")
