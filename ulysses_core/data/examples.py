"""Turns rows into examples, before tokenising: documents, conversations, preference pairs."""

from __future__ import annotations

from ulysses_core.data.conversations import fail, read_conversation, read_message, require, text_of
from ulysses_core.data.files import Row, describe_type
from ulysses_core.data.messages import ANSWER_ROLES, Example, Message, Pair, Role, Tagged
from ulysses_core.data.registry import DatasetSpec
from ulysses_core.data.tool_texts import Tool, parse_tools

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


def to_document(row: Row, spec: DatasetSpec) -> str:
    """Returns the document of a row: its prompt column, then its query column if it has one.

    Raises:
        InputError: The row lacks the column, or the column is not text or is blank.
    """
    columns = spec.columns
    if not spec.has_columns and columns.prompt not in row.values and "text" in row.values:
        document = text_of(row, "text")
    else:
        document = _joined_prompt(row, spec)
    if not document.strip():
        fail(row, "the document is blank; expected text")
    _check_unicode(row, document)
    return document


def to_example(row: Row, spec: DatasetSpec, *, needs_answer: bool = True) -> Example:
    """Returns the conversation of a row.

    Args:
        row: The row.
        spec: Its dataset.
        needs_answer: Whether an empty last answer is an error.

    Raises:
        InputError: The row lacks a column, a column has the wrong type, the turns do not
            alternate between prompt and answer, or the last answer is empty.
    """
    if spec.formatting == "alpaca":
        system, messages = text_of(row, spec.columns.system), _alpaca(row, spec)
    else:
        system, messages = read_conversation(row, spec)
    _check_unicode(row, system, *(message.content for message in messages))
    if needs_answer and not messages[-1].content.strip():
        fail(row, "the last answer is empty; expected an answer")
    return Example(system, tuple(messages), row.where, _tools(row, spec))


def to_pair(row: Row, spec: DatasetSpec) -> Pair:
    """Returns the preferred and the rejected conversation of a row.

    In alpaca format the answers are the columns `chosen` and `rejected`. In the other formats these
    hold one turn each, which answers the conversation in the messages column.

    Raises:
        InputError: As `to_example`; or an answer is missing or empty, or both are equal.
    """
    system, prompt = _prompt_of_pair(row, spec)
    answers = [_answer_of_pair(row, spec, part) for part in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        fail(row, "the chosen and the rejected answer are equal; expected two different answers")
    _check_unicode(row, system, *(message.content for message in [*prompt, *answers]))
    tools = _tools(row, spec)
    chosen, rejected = (Example(system, (*prompt, each), row.where, tools) for each in answers)
    return Pair(chosen, rejected)


def _prompt_of_pair(row: Row, spec: DatasetSpec) -> tuple[str, list[Message]]:
    if spec.formatting != "alpaca":
        return read_conversation(row, spec, needs_answer=False)
    prompt = [*_history(row, spec.columns.history), Message("user", _joined_prompt(row, spec))]
    return text_of(row, spec.columns.system), prompt


def _answer_of_pair(row: Row, spec: DatasetSpec, part: str) -> Message:
    column: str | None = getattr(spec.columns, part)
    require(row, column, part)
    value = row.values[str(column)]
    if spec.formatting != "alpaca":
        answer = read_message(row, spec, part, value)
    elif isinstance(value, str):
        answer = Message("assistant", value)
    else:
        fail(row, f"column {column!r} ({part}) is {describe_type(value)}; expected a string")
    if answer.role not in ANSWER_ROLES:
        fail(row, f"the role of {part} is {answer.role!r}; expected {' or '.join(ANSWER_ROLES)}")
    if not answer.content.strip():
        fail(row, f"column {column!r} ({part}) is empty; expected an answer")
    return answer


def to_tagged(row: Row, spec: DatasetSpec) -> Tagged:
    """Returns the conversation of a row and its `kto_tag`.

    Raises:
        InputError: As `to_example`; or the tag is not a boolean.
    """
    column = spec.columns.kto_tag
    require(row, column, "kto_tag")
    tag = row.values[str(column)]
    if not isinstance(tag, bool):
        fail(row, f"column {column!r} (kto_tag) is {describe_type(tag)}; expected true or false")
    return Tagged(to_example(row, spec), tag)


def _tools(row: Row, spec: DatasetSpec) -> tuple[Tool, ...]:
    column = spec.columns.tools
    try:
        return parse_tools(row.values.get(column)) if column else ()
    except ValueError as error:
        fail(row, f"column {column!r} (tools) is not a JSON list of functions: {error}")


def _check_unicode(row: Row, *texts: str) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        problem = f"{error.reason} at character {error.start}"
        fail(row, f"a text is not valid Unicode ({problem}); remove that character")


def _joined_prompt(row: Row, spec: DatasetSpec) -> str:
    columns = spec.columns
    require(row, columns.prompt, "prompt")
    return "\n".join(filter(None, (text_of(row, columns.prompt), text_of(row, columns.query))))


def _alpaca(row: Row, spec: DatasetSpec) -> list[Message]:
    response = spec.columns.response
    require(row, response, "response")
    if row.values[str(response)] is None:
        fail(row, f"column {response!r} (response) is null; expected a string")
    messages = [*_history(row, spec.columns.history)]
    messages.append(Message("user", _joined_prompt(row, spec)))
    messages.append(Message("assistant", text_of(row, response)))
    return messages


def _history(row: Row, column: str | None) -> list[Message]:
    pairs = row.values.get(column) if column else None
    if pairs is None:
        return []
    if not isinstance(pairs, list):
        fail(
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
                fail(
                    row,
                    f"column {column!r} (history), entry {number}: expected two strings, "
                    "[prompt, answer]",
                )
    return messages
