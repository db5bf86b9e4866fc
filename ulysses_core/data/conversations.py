"""Reads conversations in ShareGPT's and OpenAI's form from a row's messages column."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from ulysses_core.data.files import Row, describe_type
from ulysses_core.data.messages import ANSWER_ROLES, PROMPT_ROLES, Message, Role
from ulysses_core.data.registry import INFO_FILE, DatasetSpec
from ulysses_core.data.tool_calls import parse_calls
from ulysses_monitor.common.errors import InputError

__all__ = ["fail", "read_conversation", "read_message", "require", "text_of"]


def fail(row: Row, problem: str) -> NoReturn:
    """Raises `InputError` about a row."""
    raise InputError(f"{row.where}: {problem}")


def text_of(row: Row, column: str | None) -> str:
    """Returns a column's text, which is empty if the column is missing or null."""
    value = row.values.get(column) if column else None
    if value is None:
        return ""
    if not isinstance(value, str):
        fail(row, f"column {column!r} is {describe_type(value)}; expected a string")
    return value


def require(row: Row, column: str | None, part: str) -> None:
    """Raises `InputError` if a row lacks a column."""
    if column is None:
        fail(row, f"{INFO_FILE} does not name this dataset's {part} column; add it to columns")
    if column not in row.values:
        present = ", ".join(row.values) or "none"
        fail(row, f"column {column!r} ({part}) is missing; the row has: {present}")


def read_conversation(
    row: Row, spec: DatasetSpec, *, needs_answer: bool = True
) -> tuple[str, list[Message]]:
    """Returns the system text and the messages of a row.

    Args:
        row: the row.
        spec: its dataset, in ShareGPT's or OpenAI's format.
        needs_answer: whether the conversation ends with an answer; otherwise it ends with a prompt.

    Raises:
        InputError: the column is missing or has another form, or prompts and answers do not
            alternate.
    """
    column = spec.columns.messages
    require(row, column, "messages")
    turns = row.values[str(column)]
    if not isinstance(turns, list) or not turns:
        given = "an empty list" if turns == [] else describe_type(turns)
        fail(row, f"column {column!r} (messages) is {given}; expected a list of turns")
    messages = [
        read_message(row, spec, f"turn {number}", turn) for number, turn in enumerate(turns, 1)
    ]
    system = text_of(row, spec.columns.system)
    if messages[0].role == "system":
        system = messages.pop(0).content
    first = 1 + len(turns) - len(messages)
    if spec.formatting == "openai":
        messages = list(_join_results(messages))
    _check_turns(row, messages, first, needs_answer)
    return system, messages


def read_message(row: Row, spec: DatasetSpec, place: str, turn: object) -> Message:
    """Returns the message of one turn.

    Raises:
        InputError: the turn has another form, or an unknown role.
    """
    tags = spec.tags
    if not isinstance(turn, dict):
        keys = f"{tags.role_tag!r} and {tags.content_tag!r}"
        fail(row, f"{place} is {describe_type(turn)}; expected an object with {keys}")
    content = _with_calls(row, place, turn, tags.content_tag) if _has_calls(spec, turn) else None
    if content is None and spec.formatting == "openai":
        turn = turn | {tags.content_tag: _join_parts(row, place, turn.get(tags.content_tag))}
    for key in (tags.role_tag, tags.content_tag)[: 1 if content is not None else 2]:
        if not isinstance(turn.get(key), str):
            fail(
                row,
                f"{place} has no string under {key!r}; add one, or name another key in "
                f"tags in {INFO_FILE}",
            )
    role = _role(row, spec, place, turn[tags.role_tag])
    if content is not None:
        return Message("function", content)
    content = turn[tags.content_tag]
    if role == "function":
        _check_calls(row, f"{place} ({turn[tags.role_tag]})", content)
    return Message(role, content)


def _role(row: Row, spec: DatasetSpec, place: str, tag: str) -> Role:
    tags = spec.tags
    roles: dict[str, Role] = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "observation",
        tags.function_tag: "function",
        tags.system_tag: "system",
    }
    if tag not in roles:
        fail(row, f"{place}: {tags.role_tag} is {tag!r}; allowed: {', '.join(roles)}")
    return roles[tag]


def _has_calls(spec: DatasetSpec, turn: dict[str, Any]) -> bool:
    """Returns whether a turn has OpenAI's `tool_calls`."""
    return spec.formatting == "openai" and bool(turn.get("tool_calls"))


def _with_calls(row: Row, place: str, turn: dict[str, Any], content_tag: str) -> str:
    """Returns the calls of OpenAI's `tool_calls` as a function turn, after the turn's text.

    OpenAI writes the arguments as JSON text; the call gets the object that the text means.
    """
    try:
        functions = [call["function"] for call in turn["tool_calls"]]
        calls = [{"name": f["name"], "arguments": _as_json(f["arguments"])} for f in functions]
    except (KeyError, TypeError, ValueError) as error:
        fail(row, f"{place}: tool_calls is not a list of function calls: {error!r}")
    before = _join_parts(row, place, turn.get(content_tag) or "")
    written = json.dumps(calls, ensure_ascii=False)
    return f"{before}<tool_call>{written}</tool_call>" if before else written


def _as_json(value: object) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _join_parts(row: Row, place: str, content: object) -> Any:
    """Returns OpenAI's list of text parts as one text; other values unchanged."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else describe_type(part)
            fail(row, f"{place} has a part of type {kind}; allowed: text")
    return "".join(part["text"] for part in content)


def _join_results(messages: Sequence[Message]) -> Iterator[Message]:
    """Yields messages, with the results that follow one another as one turn."""
    waiting: list[str] = []
    for message in messages:
        if message.role == "observation":
            waiting.append(message.content)
            continue
        if waiting:
            yield Message("observation", waiting[0], tuple(waiting[1:]))
            waiting = []
        yield message
    if waiting:
        yield Message("observation", waiting[0], tuple(waiting[1:]))


def _check_calls(row: Row, place: str, content: str) -> None:
    try:
        parse_calls(content)
    except ValueError as error:
        fail(row, f"{place} is not a JSON function call: {error}")


def _check_turns(row: Row, messages: Sequence[Message], first: int, needs_answer: bool) -> None:
    for index, message in enumerate(messages):
        allowed = ANSWER_ROLES if index % 2 else PROMPT_ROLES
        if message.role not in allowed:
            fail(
                row,
                f"the role of turn {first + index} is {message.role!r}; expected "
                f"{' or '.join(allowed)}, because prompts and answers alternate",
            )
    if not messages or len(messages) % 2 == needs_answer:
        given = f"ends with a {messages[-1].role} turn" if messages else "has no turns"
        last = ANSWER_ROLES if needs_answer else PROMPT_ROLES
        fail(row, f"the conversation {given}; expected it to end with {' or '.join(last)}")
