"""docs/from-ulysses-pro.md: its names exist, and its code and commands run."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
from typing import Any

import pytest

from tests.core.cli.conftest import compiled_deepspeed as compiled_deepspeed
from tests.core.cli.conftest import make_world as make_world
from tests.docs.test_pages import DOCS, python_blocks
from tests.support.commands import run_python
from ulysses_core.cli import main

PAGE = DOCS / "from-ulysses-pro.md"
TEXT = PAGE.read_text("utf-8")
COMMANDS = re.findall(r"^ulysses (train .*)$", TEXT, re.MULTILINE)
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def world(make_world: Any) -> Any:
    world = make_world()
    small = {"deepspeed": None, "sequence_parallel_size": None, "max_steps": 2}
    world.config("config.yaml", output_dir="runs/x", **small)
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "sequence_parallel_size": 2,
    }
    (world.path / "ds.json").write_text(json.dumps(settings))
    return world


def test_the_names_on_the_page_exist() -> None:
    names = set(re.findall(r"`(ulysses_core(?:\.\w+)+)", TEXT))
    assert len(names) > 6
    for name in names:
        assert pkgutil.resolve_name(name) is not None


def test_a_handle_knows_the_group_as_the_page_says() -> None:
    from ulysses_core.parallel.groups import SequenceGroup

    for name in re.findall(r"`handle\.group\.(\w+)`", TEXT):
        assert name in SequenceGroup.__dataclass_fields__ or hasattr(SequenceGroup, name)


def test_the_manager_runs_as_the_page_says(world: Any) -> None:
    (block,) = python_blocks(PAGE)
    done = run_python(
        "-c", block, folder=world.path, environment={"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "'state': 'finished'" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_accepted(
    world: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.path)
    monkeypatch.setattr("sys.argv", ["ulysses", *shlex.split(command), "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code


@pytest.mark.full
@pytest.mark.usefixtures("compiled_deepspeed")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_trains(world: Any, command: str) -> None:
    words = shlex.split(command)
    done = world.run(*words, timeout=400)
    assert done.returncode == 0, done.stderr
    run = next(word for word in words if word.startswith("output_dir=")).partition("=")[2]
    info = json.loads((world.path / run / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["world_size"] == (2 if "deepspeed=ds.json" in words else 1)
    if "--debug" in words:
        assert "DEBUG ulysses_core" in done.stderr
