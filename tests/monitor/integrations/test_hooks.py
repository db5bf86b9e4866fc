"""A Trainer is watched if it has what is patched, whatever its version."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ulysses_monitor as um
from ulysses_monitor.integrations import hooks

Versions = dict[str, str]


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Versions]:
    """Versions that packages have in a test; nothing was logged, no framework is there."""
    given = {"transformers": "5.20.0", "accelerate": "1.12.1"}
    monkeypatch.setattr(importlib.metadata, "version", given.__getitem__)
    for name in hooks._FRAMEWORKS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    hooks._warn_of_untried.cache_clear()
    yield given
    hooks._warn_of_untried.cache_clear()


def trainer(*, without: str = "") -> Any:
    def make(*names: str) -> Any:
        return types.SimpleNamespace(**{n: print for n in names if n != without})

    found = make("get_batch_samples", "_prepare_inputs", "_get_output_dir")
    found.accelerator = make("backward", "clip_grad_norm_")
    return found


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.0.0", "5.24.4"])
def test_a_version_that_was_tried_is_watched_without_a_word(
    version: str, versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    versions["transformers"] = version
    hooks.check_hooks(trainer())
    assert not caplog.records


@pytest.mark.parametrize("version", ["4.56.2", "5.25.0.dev0", "6.0.0"])
def test_another_version_is_watched_and_said_once(
    version: str, versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    versions["transformers"] = version
    with caplog.at_level(logging.WARNING):
        hooks.check_hooks(trainer())
        hooks.check_hooks(trainer())
    assert caplog.messages == [
        f"monitor: transformers {version} is untried, 4.57 to 5.24 work; "
        "the training is watched anyway"
    ]


@pytest.mark.parametrize("hook", ["get_batch_samples", "backward", "clip_grad_norm_"])
def test_a_missing_hook_is_refused_with_its_name_and_what_to_do(hook: str) -> None:
    expected = (
        rf"^monitor: transformers 5\.20\.0 with accelerate 1\.12\.1 has no \w+\.{hook}; "
        r"expected transformers 4\.57 to 5\.24: .*monitor\.watch\("
    )
    with pytest.raises(um.InputError, match=expected):
        hooks.check_hooks(trainer(without=hook))


@pytest.mark.parametrize(
    ("module", "package"), [("llamafactory", "llamafactory"), ("swift", "ms-swift")]
)
@pytest.mark.parametrize(
    "check",
    [
        lambda: hooks.check_hooks(trainer(without="backward")),
        lambda: hooks.check_handler(types.ModuleType("transformers.trainer")),
    ],
)
def test_a_refusal_names_the_framework_in_use(
    check: Callable[[], None],
    module: str,
    package: str,
    versions: Versions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    versions[package] = "0.9.5"
    with pytest.raises(um.InputError, match=rf"\(used by {package} 0\.9\.5\) has no "):
        check()


def test_a_module_with_a_handler_of_callbacks_is_accepted() -> None:
    module = types.ModuleType("transformers.trainer")
    module.CallbackHandler = types.SimpleNamespace(call_event=print)  # type: ignore[attr-defined]
    hooks.check_handler(module)
