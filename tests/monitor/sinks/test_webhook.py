"""Alerts reach a webhook at a limited rate, and its URL never leaks."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from tests.monitor.sinks.sink_items import (
    Receiver,
    alert,
    deliver,
    on_a_thread,
    record,
    stop,
)
from tests.support.ports import free_port
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.sinks.webhook import WebhookError, WebhookSink

SECRET = "T00/B00/s3cr3t-path"  # noqa: S105 - made up


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver() as receiver:
        monkeypatch.setenv("HOOK", f"http://127.0.0.1:{receiver.port}/services/{SECRET}")
        yield receiver


def texts(receiver: Receiver) -> list[str]:
    return [json.loads(body)["text"] for body in receiver.bodies]


def test_an_alert_is_posted_in_slacks_format(receiver: Receiver, tmp_path: Any) -> None:
    sink = WebhookSink("HOOK")
    sink.open(tmp_path / "demo", {})
    deliver(sink, [record(1), alert(7)])
    assert texts(receiver) == ["[demo] step 7: critical spike: It broke."]
    assert receiver.headers[0]["Content-Type"] == "application/json"
    assert receiver.paths == [f"/services/{SECRET}"]


def test_only_runs_that_did_not_finish_are_posted(receiver: Receiver) -> None:
    ends = [stop(1, "finished"), stop(2, "failed"), stop(3, "stopped")]
    deliver(WebhookSink("HOOK", every_seconds=0), ends)
    assert texts(receiver) == ["[run] step 2: the run failed", "[run] step 3: the run stopped"]


def test_other_kinds_of_events_are_posted_on_request(receiver: Receiver) -> None:
    deliver(WebhookSink("HOOK", kinds=["stop"]), [alert(1), stop(2, "failed")])
    assert len(receiver.bodies) == 1


def test_repeats_of_a_rule_are_counted_in_its_next_message(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("ulysses_monitor.sinks.webhook.time.monotonic", lambda: now[0])
    sink = WebhookSink("HOOK")
    for step in range(1, 6):
        sink.write(alert(step))
    sink.write(alert(6, rule="another"))
    now[0] += 10.5
    sink.write(alert(7))
    assert [text.split(":")[0] for text in texts(receiver)] == [
        "[run] step 1",
        "[run] step 6",
        "[run] step 7",
    ]
    assert texts(receiver)[-1].endswith("(4 more of these since the last message)")


def test_slack_markup_is_escaped(receiver: Receiver) -> None:
    message = '<!channel> & <script>alert("1")</script>\nnewline 🙂 \ud800'
    deliver(WebhookSink("HOOK"), [alert(1, message=message)])
    (text,) = texts(receiver)
    assert "&lt;!channel&gt; &amp; &lt;script&gt;" in text
    assert "<" not in text
    assert "🙂 \\ud800" in text


def test_a_long_message_is_cut(receiver: Receiver) -> None:
    deliver(WebhookSink("HOOK"), [alert(1, message="x" * 100_000)])
    assert len(texts(receiver)[0]) < 3100


def test_an_unreachable_receiver_is_an_error_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{port}/{SECRET}")
    sink = WebhookSink("HOOK")
    for _ in range(2):
        with pytest.raises(ConnectionError, match="not delivered: ConnectionRefusedError"):
            on_a_thread(lambda: sink.write(alert(1)))
    with Receiver(port) as first:
        on_a_thread(lambda: sink.write(alert(1)))
    sink._sent.clear()
    with pytest.raises(ConnectionError):
        on_a_thread(lambda: sink.write(alert(2)))
    with Receiver(port) as second:
        on_a_thread(lambda: sink.write(alert(2)))
    assert texts(first) == ["[run] step 1: critical spike: It broke."]
    assert texts(second) == ["[run] step 2: critical spike: It broke."]


@pytest.mark.parametrize(
    ("code", "kind"),
    [(500, ConnectionError), (429, ConnectionError), (404, WebhookError), (302, WebhookError)],
)
def test_a_refusal_is_distinguished_from_a_busy_server(
    receiver: Receiver, code: int, kind: type[Exception]
) -> None:
    receiver.answers = [code, 200]
    sink = WebhookSink("HOOK")
    with pytest.raises(kind, match=f"status {code}"):
        sink.write(alert(1))
    sink.write(alert(2))
    assert receiver.paths == [f"/services/{SECRET}"] * 2  # a redirect is not followed
    assert ("1 more" in texts(receiver)[1]) == (kind is WebhookError)


def test_the_url_appears_in_no_error_log_or_repr(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{free_port()}/{SECRET}")
    sink = WebhookSink("HOOK")
    with pytest.raises(ConnectionError) as failure:
        sink.write(alert(1))
    error = failure.value
    shown = "".join(traceback.format_exception(error)) + repr(sink) + caplog.text
    assert SECRET not in shown
    assert error.__cause__ is None
    assert error.__context__ is None


def test_the_url_is_not_logged_when_a_message_is_accepted(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    deliver(WebhookSink("HOOK"), [alert(1)])
    assert receiver.bodies
    assert SECRET not in caplog.text


def test_secrets_in_messages_are_masked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "swordfish-0123")
    deliver(WebhookSink("HOOK"), [alert(1, message="refused: swordfish-0123")])
    assert texts(receiver) == ["[run] step 1: critical spike: refused: ***"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "the environment variable HOOK is not set"),
        (f"http://example.org/{SECRET}", "http is allowed to this machine only"),
        (f"ftp://127.0.0.1/{SECRET}", "does not hold an https URL"),
        (f"http://[::1/{SECRET}", "does not hold an https URL"),
        (SECRET, "does not hold an https URL"),
        (f"https:///{SECRET}", "does not hold an https URL"),
        (f"http://127.0.0.1.example.org/{SECRET}", "http is allowed to this machine only"),
        (f"http://127.0.0.1@example.org/{SECRET}", "http is allowed to this machine only"),
    ],
)
def test_an_unsafe_url_is_refused_and_not_repeated(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", url)
    with pytest.raises(InputError, match=message) as refused:
        WebhookSink("HOOK")
    assert SECRET not in str(refused.value)


def test_a_url_in_place_of_a_variable_name_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="not the name of an environment variable") as refused:
        WebhookSink(f"https://hooks.example.org/{SECRET}")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": "alert"}, "kinds is 'alert'; expected a list of kinds of events, such as"),
        ({"kinds": [1]}, "kinds.0 is 1; expected text"),
        ({"every_seconds": "10"}, "every_seconds is '10'; expected a number from 0 to 86,400"),
    ],
)
def test_wrong_arguments_are_refused(
    receiver: Receiver, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"sink webhook: {message}"):
        WebhookSink("HOOK", **wrong)
