"""What a chat template says of a conversation's turns."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_core.data.tool_calls import ToolStyle

__all__ = ["Template"]


@dataclass(frozen=True, kw_only=True)
class Template:
    """How to write each turn. `{content}` is the turn's text; `{bos}` and `{eos}` are tokens."""

    user: str
    assistant: str = "{content}{eos}"
    system: str = "{content}"
    observation: str | None = None
    """None writes observations as user turns."""
    function: str | None = None
    """None writes function calls as assistant turns."""
    prefix: str = ""
    """Text at the start of every conversation."""
    default_system: str = ""
    system_in_user: bool = False
    """Whether the system text goes inside the first user turn; otherwise it goes before it."""
    tool_style: ToolStyle = "default"
    has_thoughts: bool = False
    """Whether answers begin with a thought; one without it gets an empty thought."""
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    """What begins and what ends a thought."""
    ends_with_eos: bool = False
    """Whether one end-of-sequence token follows the last answer, instead of one in each answer.

    What follows an earlier answer takes its place: there the label is that token.
    """
    stop: str | None = None
    """Text that ends an answer and should be a single token of the tokenizer."""
