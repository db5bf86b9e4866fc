"""Sends events to a Slack-compatible webhook. Its URL is a secret and is never shown."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from ulysses_monitor.common.errors import InputError, UlyssesError
from ulysses_monitor.common.masking import mask_text
from ulysses_monitor.common.settings import Text, checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import escape_surrogates
from ulysses_monitor.sinks.arguments import EventKinds

__all__ = ["WebhookSink"]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LONGEST = 3000
"""Characters of a message; Slack cuts at 40,000, people sooner."""


class WebhookError(UlyssesError):
    """The receiver refused a message; the error tells why, but never the URL."""


class WebhookSink:
    """Posts ``{"text": ...}`` for alerts, and for a run that fails or is stopped.

    Args:
        url_env: name of the environment variable that holds the URL, which is https, or http to
            this machine.
        kinds: kinds of events to post; a ``stop`` is posted only if the run did not finish.
        every_seconds: shortest pause between two messages of one rule; the next message tells how
            many came in between.

    Raises:
        InputError: an argument is wrong, or the variable holds no such URL.
    """

    name = "webhook"

    @checked_arguments("sink webhook")
    def __init__(
        self,
        url_env: Text,
        kinds: EventKinds = ("alert", "stop"),
        every_seconds: Annotated[float, Field(ge=0, le=86400)] = 10.0,
    ) -> None:
        self._url = _url_from(url_env)
        self._kinds, self._every = tuple(kinds), every_seconds
        self._run = "run"
        self._sent: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def __repr__(self) -> str:
        return "WebhookSink(url_env=...)"

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Sets the name of the run."""
        self._run = str(info.get("name") or run_dir.name)

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`.

        Raises:
            ConnectionError: the receiver is unreachable; the item can be written again.
            WebhookError: the receiver refused the message, which counts as held back.
        """
        if isinstance(item, StepRecord) or item.kind not in self._kinds or _has_finished(item):
            return
        key = str(item.data.get("rule", item.kind))
        held = self._held.get(key, 0)
        if key in self._sent and time.monotonic() - self._sent[key] < self._every:
            self._held[key] = held + 1
            return
        try:
            _post(self._url, self._message(item, held))
        except WebhookError:
            self._held[key] = held + 1
            raise
        self._sent[key], self._held[key] = time.monotonic(), 0

    def _message(self, event: Event, held: int) -> str:
        parts = [f"[{self._run}] step {event.step}: {_describe(event)}"]
        if held:
            parts.append(f"({held} more of these since the last message)")
        return _for_slack(mask_text(" ".join(parts)))

    def flush(self) -> None:
        """Does nothing, because `write` sends immediately."""

    def close(self) -> None:
        """Does nothing, because nothing is open."""


def _url_from(variable: str) -> str:
    if not variable.replace("_", "").isalnum():
        # Most likely the URL itself, so it is not repeated here.
        raise InputError(
            "sink webhook: url_env is not the name of an environment variable; the URL is a "
            "secret and does not belong in a config"
        )
    url = os.environ.get(variable, "")
    if not url:
        raise InputError(f"sink webhook: the environment variable {variable} is not set")
    if not _is_safe(url):
        raise InputError(
            f"sink webhook: {variable} does not hold an https URL; http is allowed to this "
            "machine only"
        )
    return url


def _is_safe(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    return bool(host) and (
        parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK)
    )


def _has_finished(event: Event) -> bool:
    return event.kind == "stop" and event.data.get("status") == "finished"


def _describe(event: Event) -> str:
    data = event.data
    if event.kind == "alert":
        about = f"{data.get('severity')} {data.get('rule')}: {data.get('message')}"
        return f"{about} {data.get('hint') or ''}".strip()
    if event.kind == "stop":
        return f"the run {data.get('status')}"
    details = json.dumps(dict(data), default=str, ensure_ascii=False)
    return f"{event.kind} {details}"


def _for_slack(message: str) -> str:
    """Escapes Slack markup (Slack's documentation, "Escaping text"), and shortens the message."""
    message = escape_surrogates(message)
    if len(message) > _LONGEST:
        message = message[:_LONGEST] + "…"
    return message.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which could send the message to another place than the user chose."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, message: str) -> None:
    # Not httpx or requests, because they log the URL.
    body = json.dumps({"text": message}).encode()
    request = urllib.request.Request(  # noqa: S310 - https, or http to loopback: see _is_safe
        url, body, {"Content-Type": "application/json", "User-Agent": "ulysses-toolkit"}
    )
    problem: Exception | None = None
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=10) as answer:
            answer.read(1024)
    except urllib.error.HTTPError as error:
        is_temporary = error.code >= 500 or error.code == 429
        kind = ConnectionError if is_temporary else WebhookError
        problem = kind(f"the receiver refused the message with status {error.code}")
        error.close()
    except Exception as error:  # noqa: BLE001 - any error may quote the URL
        why = type(getattr(error, "reason", None) or error).__name__
        problem = ConnectionError(f"the message was not delivered: {why}")
    if problem is not None:  # raised here, so that no error with the URL is chained to it
        raise problem
