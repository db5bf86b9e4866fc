from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_LONGEST_BUILD_SECONDS = 300
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_FILES = (
    "core/cli/test_training.py",
    "monitor/steering/acting/test_actions.py",
    "monitor/integrations/test_policies_in_trainers.py",
    "monitor/integrations/test_hf_trainer.py",
    "monitor/integrations/test_trl_trainers.py",
    "monitor/engines/test_engines_exactness.py",
    "core/parallel/test_sequence_training.py",
    "core/cli/test_attach.py",
    "monitor/session/test_process_exit.py",
)


def pytest_configure() -> None:
    """Keeps what DeepSpeed compiles on first use with the virtual environment.

    A process that is killed while it compiles leaves a lock that all later ones wait for, forever.
    Only these tests use this folder, and kill such processes, so it is theirs to clean.
    """
    folder = Path(sys.prefix, "torch_extensions")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))
    if "ULYSSES_CACHE_DIR" not in os.environ:  # the workers of xdist share their parent's
        os.environ["ULYSSES_CACHE_DIR"] = tempfile.mkdtemp(prefix="ulysses-cache-")
        atexit.register(shutil.rmtree, os.environ["ULYSSES_CACHE_DIR"], ignore_errors=True)
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > _LONGEST_BUILD_SECONDS:
            lock.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _log_levels() -> Iterator[None]:
    """Undoes the log levels that a command sets when a test runs it in this process."""
    loggers = [logging.getLogger(name) for name in ("ulysses_core", "ulysses_monitor")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _launch_variables() -> Iterator[None]:
    """Removes what DeepSpeed sets when a test trains in this process: later ones are no ranks."""
    before = {name: os.environ.get(name) for name in _LAUNCH_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the longer grids")
    parser.addoption("--clients", action="store_true", help="also run programs that train")
    parser.addoption("--install", action="store_true", help="also install the wheel afresh")
    parser.addoption("--services", action="store_true", help="also test against real servers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    _skip(config, items, "full", "a longer grid; give --full to run it")
    _skip(config, items, "clients", "installs programs that train; give --clients to run it")
    _skip(config, items, "install", "installs the wheel afresh; give --install to run it")
    _skip(config, items, "services", "needs servers on this machine; give --services to run it")


def _skip(config: pytest.Config, items: list[pytest.Item], marker: str, reason: str) -> None:
    if not config.getoption(f"--{marker}"):
        for item in items:
            if item.get_closest_marker(marker):  # keywords have the names of folders too
                item.add_marker(pytest.mark.skip(reason=reason))


def _place(item: pytest.Item) -> int:
    """Sorts the longest files to the front, so that no worker is left alone with one at the end."""
    name = item.path.relative_to(_TESTS).as_posix()
    return _LONGEST_FILES.index(name) if name in _LONGEST_FILES else len(_LONGEST_FILES)
