"""Takes secrets out of what is about to be written or logged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["masked_text", "without_secrets"]

_NAME = re.compile(
    r"(token(?!i[sz]e)|secret|passw|(api|access|private)_?key|credential|webhook)", re.IGNORECASE
)
_IN_URL = re.compile(
    r"(?<=://)[^/@\s]+(?=@)|(?<=[?&])((?:\w*(?:token|secret|key|passw\w*|sig(?:nature)?))=)[^&\s\"']+",
    re.IGNORECASE,
)
_MASK = "***"
_SHORTEST = 8
"""Characters below which a value of the environment is not looked for: it may be any word."""


def without_secrets(value: Any, masked: bool = False) -> Any:
    """`value` with secrets masked, at any depth.

    Masked are strings under a key that names a secret, and whatever `masked_text` finds in others.
    """
    if isinstance(value, Mapping):
        return {
            k: without_secrets(v, masked or bool(_NAME.search(str(k)))) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(v, masked) for v in value]
    if not isinstance(value, str):
        return value
    return _MASK if masked and value else masked_text(value)


def masked_text(text: str) -> str:
    """`text` without credentials of URLs and without the values of secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _NAME.search(name):
            text = text.replace(value, _MASK)
    return _IN_URL.sub(lambda match: f"{match[1] or ''}{_MASK}", text)
