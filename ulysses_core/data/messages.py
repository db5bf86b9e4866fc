"""Conversations as every format of rows gives them, and as templates render them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ulysses_core.data.tool_texts import Tool

__all__ = ["ANSWER_ROLES", "PROMPT_ROLES", "Example", "Message", "Pair", "Role", "Tagged"]

Role = Literal["user", "assistant", "observation", "function", "system"]

PROMPT_ROLES: tuple[Role, Role] = ("user", "observation")
ANSWER_ROLES: tuple[Role, Role] = ("assistant", "function")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str
    more: tuple[str, ...] = ()
    """Further results of the same turn, if it called several functions."""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation: each user or observation turn is followed by an assistant or function one."""

    system: str
    messages: tuple[Message, ...]
    where: str = field(default="", compare=False)
    """Where the row is in its file, for error messages."""
    tools: tuple[Tool, ...] = ()
    """The functions that the model may call."""


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
