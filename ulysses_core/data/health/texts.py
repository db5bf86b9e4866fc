"""What is wrong in the texts of rows: marks of a template, secrets, addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING

from ulysses_core.data.templates import get_template
from ulysses_monitor.common.masking import find_secrets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextScanner", "list_special_ids"]

_FOREIGN = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|endoftext|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]"),
    *("### Instruction:", "### Response:"),
)
"""Marks of templates that are in wide use; each ends up in texts that were scraped or exported."""
_SHORTEST = 4
"""Characters of a mark: shorter pieces of a template are in any text."""
_PLACES = re.compile(r"\{(?:content|eos|bos)\}|\n")
_ADDRESS = re.compile(r"[\w.+-]{1,64}@(?!example\.)[\w-]{1,64}(?:\.[\w-]{2,24})+")


class TextScanner:
    """Looks through texts for what should not be in them.

    Args:
        tokenizer: its special tokens are marks.
        template: the name of the template, whose texts between contents are marks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        tokens = tokenizer.convert_ids_to_tokens(sorted(list_special_ids(tokenizer)))
        special = [text for text in tokens if len(text) >= _SHORTEST - 1]
        own = [] if template is None and tokenizer.chat_template else _template_marks(template)
        marks = dict.fromkeys([*special, *own, *_FOREIGN])
        ordered = sorted(marks, key=len, reverse=True)
        self._marks = re.compile("|".join(map(_pattern, ordered)), re.MULTILINE)

    def find_mark(self, texts: Iterable[str]) -> str:
        """Returns the first mark of a template, or special token, in texts; empty if none."""
        found = (self._marks.search(text) for text in texts)
        return next((match.group().strip() for match in found if match), "")

    @staticmethod
    def find_secrets(texts: Iterable[str]) -> list[str]:
        """Returns the kinds of secrets in texts; see `ulysses_monitor.common.masking`."""
        return reduce(lambda known, text: known or find_secrets(text), texts, list[str]())

    @staticmethod
    def has_address(texts: Iterable[str]) -> bool:
        """Whether a text holds an e-mail address, other than one at ``example.com``."""
        return any("@" in text and _ADDRESS.search(text) for text in texts)


def list_special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of special tokens, also of those that have no role such as ``eos_token``."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}


def _template_marks(name: str | None) -> list[str]:
    template = get_template(name or "default")
    written = (template.user, template.assistant, template.system, template.observation or "")
    pieces = (piece.strip() for text in written for piece in _PLACES.split(text))
    return [piece for piece in pieces if len(piece) >= _SHORTEST]


def _pattern(mark: str) -> str:
    """Returns the pattern of a mark; one that is plain words counts at the start of a line only."""
    is_plain = all(c.isalnum() or c in " :,.'-" for c in mark)
    return rf"^{re.escape(mark)}" if is_plain else re.escape(mark)
