"""Masks secrets in what is about to be written or logged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["find_secrets", "mask_secrets", "mask_text"]

_MASK = "***"
_SECRET_WORD = re.compile(
    "secrets?|passwords?|passwd|passphrase|pwd|authorization|cookies?|bearer|credentials?|webhook"
    "|signature"
)
_BEFORE_KEY = re.compile("api|access|private|secret|account|signing|encryption")
_TEXT_TOKEN = re.compile(
    "pad|eos|bos|unk|sep|cls|mask|image|video|audio|vision|special|added|stop|bad|start|end|begin"
    "|first|last|next|new|prev|prompt|decoder|boi|eoi|eot|eom|suffix|prefix|middle|fill|box|object"
    "|per|by|each|cpu|gpu|answer|response|assistant|system|think|newline|blank|separator"
)
"""Words before ``token`` that make it a token of a text, as in ``pad_token``, not a secret."""

_PLACES = ("dir", "path", "file", "name", "env")
"""Last words of names that tell where a secret is; the place itself is not a secret."""

_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+")
# Each of these reads a text once: a word or an address is entered at its start alone.
_ADDRESS = re.compile(r"://([^\s\"']+)")
_NAME = re.compile(r"(?<![\w-])([\w-]+)['\"]?\s*[=:](?!//)\s*['\"]?")
_VALUE = re.compile(r"[^\s&\"',;)}]{4,}")
_KNOWN = re.compile(
    r"\b(bearer\s+|hooks\.slack\.com/|hf_|sk-|gh[pousr]_|xox[abp]-|AKIA)[\w./~+-]{8,}",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile("-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----")
_SHORTEST = 8
"""Fewest characters of an environment variable's value to mask: shorter ones may be any word."""


def mask_secrets(value: Any, is_secret: bool = False) -> Any:
    """Returns `value` with secrets masked, at any depth.

    It masks text under a key that names a secret, the argument after an option that names one, and
    what `mask_text` finds elsewhere.

    Args:
        value: text, numbers, None, and lists and mappings of them.
        is_secret: whether `value` is under a key that names a secret.
    """
    if isinstance(value, Mapping):
        return {
            mask_text(k) if isinstance(k, str) else k: mask_secrets(v, is_secret or _is_secret(k))
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        options = [False, *map(_is_secret_option, value)]
        return [mask_secrets(v, is_secret or o) for v, o in zip(value, options, strict=False)]
    if not isinstance(value, str):
        return value
    return _MASK if is_secret and value else mask_text(value)


def mask_text(text: str) -> str:
    """Returns `text` with secrets masked.

    It masks credentials in URLs, tokens of known formats, what is assigned to the name of a
    secret, and the values of secret environment variables.
    """
    for name in list(os.environ):
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST and value in text and _is_secret_value(name, value):
            text = text.replace(value, _MASK)
    return _mask_assigned(_KNOWN.sub(rf"\1{_MASK}", _ADDRESS.sub(_mask_user, text)))


def _mask_user(address: re.Match[str]) -> str:
    _, at, host = address[1].rpartition("@")
    return f"://{_MASK}@{host}" if at else address[0]


def find_secrets(text: str) -> list[str]:
    """Returns what kinds of secrets are in `text`: those that it would mask, and private keys.

    The values of environment variables are not looked for.
    """
    found = []
    if any("@" in address[1] for address in _ADDRESS.finditer(text)):
        found.append("credentials in a URL")
    if _KNOWN.search(text):
        found.append("a key or token of a known format")
    if "-----" in text and _PRIVATE_KEY.search(text):
        found.append("a private key")
    if _mask_assigned(text) != text:
        found.append("a value behind the name of a secret")
    return found


def _mask_assigned(text: str) -> str:
    """Masks what is assigned to a secret's name, also within a value, as in ``log: token=...``."""
    parts, done = [], 0
    while name := _NAME.search(text, done):
        value = _VALUE.match(text, name.end()) if _is_secret(name[1]) else None
        parts += [text[done : name.end()], _MASK if value else ""]
        done = value.end() if value else name.end()
    return "".join([*parts, text[done:]])


def _is_secret(name: Any) -> bool:
    words = [word.lower() for word in _WORD.findall(str(name).replace("_", " "))]
    if not words or words[-1] in _PLACES:
        return False
    return any(map(_SECRET_WORD.fullmatch, words)) or _ends_in_a_secret(words)


def _ends_in_a_secret(words: Sequence[str]) -> bool:
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in ("key", "keys"):
        return _BEFORE_KEY.fullmatch(before) is not None
    return last == "token" and _TEXT_TOKEN.fullmatch(before) is None


def _is_secret_option(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("--") and _is_secret(value)


def _is_secret_value(name: str, value: str) -> bool:
    """Returns whether an environment variable's value is a secret, not a path or a plain word."""
    return _is_secret(name) and any(c.isdigit() for c in value) and not value.startswith(("/", "~"))
