"""Secrets are masked, and what only looks like one to a careless eye is not."""

from __future__ import annotations

from typing import Any

import pytest

from ulysses_monitor.common.masking import mask_secrets, mask_text

SECRET_KEYS = [
    *("token", "hub_token", "HF_TOKEN", "push_to_hub_token", "use_auth_token", "accessToken"),
    *("MLFLOW_TRACKING_TOKEN", "some_service_token", "id_token", "csrf-token"),
    *("password", "db_password", "PASSWD", "pwd", "secret", "client_secret", "Authorization"),
    *("api_key", "api-key", "x-api-key", "WANDB_API_KEY", "api_keys", "AWS_SECRET_ACCESS_KEY"),
    *("private_key", "webhook", "webhook_url", "credentials", "Cookie", "aws_session_token"),
]

PLAIN_KEYS = [
    *("pad_token", "eos_token", "image_token", "token_column", "token_type", "max_tokens"),
    *("tokens", "include_num_input_tokens_seen", "secretary", "special_tokens_map", "keys"),
    *("added_tokens", "token_level", "tokenizer", "tokenized_path", "key", "key_heads", "monkey"),
    *("secret_dir", "token_file", "url_env", "webhook_env", "password_file", "loss_tokens"),
]


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_text_under_a_secret_name_is_masked(key: str) -> None:
    assert mask_secrets({key: "abc"}) == {key: "***"}
    assert mask_secrets({"a": [{key: {"b": ["abc", 3]}}]}) == {"a": [{key: {"b": ["***", 3]}}]}
    assert mask_secrets({key: ""}) == {key: ""}


@pytest.mark.parametrize("key", PLAIN_KEYS)
def test_text_under_other_names_is_kept(key: str) -> None:
    assert mask_secrets({key: "abc"}) == {key: "abc"}
    assert mask_secrets({key: {"content": "<pad>"}}) == {key: {"content": "<pad>"}}


@pytest.mark.parametrize(
    "text",
    [
        "no answer from https://me:ABC123def@host/path",
        "https://me:p@ABC123def@host",
        "https://me:p/ABC123def@host",
        "https://ABC123def@host",
        "s3://bucket/x?X-Amz-Signature=ABC123def&X-Amz-Security-Token=ABC123def",
        "https://host/#access_token=ABC123def",
        "Namespace(lr=1, hub_token='ABC123def')",
        "{'api_key': 'ABC123def'}",
        "Authorization: Bearer ABC123def",
        "token=ABC123def",
        "POST https://hooks.slack.com/services/T00/B00/ABC123def",
        "login with hf_ABC123defABC123def",
    ],
)
def test_secrets_within_a_text_are_masked(text: str) -> None:
    assert "ABC123def" not in mask_text(text)
    assert "ABC123def" not in str(mask_secrets({"a": text, text: 1}))


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/path?page=3#top",
        "unexpected token: '<' at line 3",
        "step 3: loss=2.5, tokens=123456, max_tokens: 4096",
        "s3://bucket/runs/demo",
        "name@example.org wrote to s3://bucket",
        "pad_token='<|endoftext|>'",
    ],
)
def test_other_text_is_kept(text: str) -> None:
    assert mask_text(text) == text


def test_the_value_of_a_secret_option_is_masked() -> None:
    given = ["train.py", "--hub_token", "abc", "--lr", "1e-4", "--api-key=ABC123"]
    assert mask_secrets(given) == [*given[:2], "***", *given[3:5], "--api-key=***"]


def test_values_of_secret_variables_are_masked_wherever_they_occur(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values: dict[str, Any] = {
        "SOME_API_KEY": "zxcv-0123456789",
        "MY_SECRET_DIR": "/workspace1",
        "MAX_TOKENS": "training1",
        "MY_TOKEN": "training-word",
        "MLFLOW_TRACKING_TOKEN": "swordfish-0123",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    text = "zxcv-0123456789 in /workspace1 while training1 a training-word swordfish-0123"
    assert mask_text(text) == "*** in /workspace1 while training1 a training-word ***"


def test_a_secret_in_a_log_line_is_masked_behind_the_loggers_name() -> None:
    assert mask_text("ERROR mine: password=hunter2 url=x") == "ERROR mine: password=*** url=x"
    assert mask_text("mine: loss=0.123456") == "mine: loss=0.123456"


@pytest.mark.parametrize("piece", ["x", "a:", "://", "log: ", "bearer ", "://a@ "])
def test_a_long_text_is_read_to_its_end(piece: str) -> None:
    long = piece * 20_000
    assert mask_text(f"{long} token=abcd1234").endswith(" token=***")
