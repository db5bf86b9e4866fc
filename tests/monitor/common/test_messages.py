"""What users read: messages without our module paths, and the names of the API."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ulysses_monitor as um

ROOT = Path(__file__).parents[3]
SAYING = {"InputError", "notify", "echo", "warning", "error", "info", "exception", "write"}
OWN_PATH = re.compile(r"\bulysses_(monitor|core)\.(?!cli train)[a-z]")


def said(tree: ast.AST) -> list[str]:
    """Returns the texts of errors, log lines and prints."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [(call, getattr(call.func, "id", getattr(call.func, "attr", ""))) for call in calls]
    parts = [part for call, name in names if name in SAYING for part in ast.walk(call)]
    return [
        part.value
        for part in parts
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def test_no_message_has_a_module_path_of_ours() -> None:
    files = [
        f for package in ("ulysses_monitor", "ulysses_core") for f in (ROOT / package).rglob("*.py")
    ]
    texts = [text for file in files for text in said(ast.parse(file.read_text(encoding="utf-8")))]
    assert len(texts) > 300
    assert [text for text in texts if OWN_PATH.search(text)] == []


def test_dir_lists_the_api_and_nothing_else() -> None:
    assert dir(um) == sorted(um.__all__)
    assert {"Monitor", "MonitorCallback", "open_run", "Metric", "Alert", "Action"} <= set(dir(um))


class Raises:
    name = "raises"

    def __init__(self) -> None:
        raise RuntimeError("no connection")


@pytest.mark.parametrize(
    ("setting", "path", "message"),
    [
        ("rules", "mine_now:Raises", "rule mine_now:Raises: RuntimeError: no connection"),
        ("sinks", "mine_now:Raises", "sink mine_now:Raises: RuntimeError: no connection"),
        ("policies", "mine_now:none", "policy mine_now:none: mine_now has no none"),
        ("rules", "broken_mine:x", "rule broken_mine:x: ZeroDivisionError: division by zero"),
        (
            "rules",
            "not_there:x",
            "rule not_there:x: cannot be imported: No module named 'not_there'",
        ),
    ],
)
def test_what_the_users_own_code_raises_is_told_under_its_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, path: str, message: str
) -> None:
    module = ModuleType("mine_now")
    module.Raises = Raises  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine_now", module)
    (tmp_path / "broken_mine.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(um.InputError) as caught:
        um.Monitor(tmp_path / "run", **{setting: [path]})
    assert str(caught.value) == message
