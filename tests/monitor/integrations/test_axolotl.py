"""The axolotl plugin, against a stand-in of the interface that axolotl documents.

axolotl needs Python 3.12, so it is not tried itself.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

import ulysses_monitor as um
from tests.support.hf_cases import build_trainer

PATH = "ulysses_monitor.integrations.axolotl.UlyssesPlugin"


class BasePlugin:
    """The methods that the plugin replaces, as axolotl's PluginManager calls them."""

    def register(self, cfg: Any) -> None:
        raise AssertionError

    def get_input_args(self) -> str | None:
        raise AssertionError

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        raise AssertionError


def load(path: str) -> Any:
    """Finds a class as axolotl does."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    yield load(PATH)()
    sys.modules.pop(PATH.rpartition(".")[0])


def test_the_trainer_that_axolotl_creates_is_watched(plugin: Any, tmp_path: Path) -> None:
    cfg = {"ulysses": {"tensorboard": False, "sample_every": 2}}
    plugin.register(cfg)
    trainer = build_trainer("plain", tmp_path)
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    run = um.open_run(tmp_path / "output/ulysses")
    assert run.metrics("grad/norm/total").index.tolist() == [1, 2, 3, 4]
    assert run.metrics("param/norm/total").dropna().index.tolist() == [1, 3]


def test_its_keys_are_part_of_the_configuration(plugin: Any) -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid")
        base_model: str

    class Merged(Strict, load(plugin.get_input_args())):  # type: ignore[misc]
        pass

    assert Merged(base_model="m").ulysses is None
    assert Merged(base_model="m", ulysses={"run_dir": "x"}).ulysses == {"run_dir": "x"}


def test_a_wrong_setting_is_told_before_the_model_is_loaded(plugin: Any) -> None:
    with pytest.raises(um.InputError, match="axolotl: ulysses: sample_every is 0"):
        plugin.register({"ulysses": {"sample_every": 0}})
    plugin.register({})
