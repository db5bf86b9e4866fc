"""`ulysses store compact`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ulysses_monitor as um
from ulysses_monitor.records import Schema, StepRecord
from ulysses_monitor.store import RunDirectory, StoreSink

Ulysses = Callable[..., tuple[int, str, str]]
SCHEMA = Schema(("a/a/a", "b/b/b"))


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    sink = StoreSink(directory, part_rows=10)
    for step in range(1, 26):
        sink.write(StepRecord(step, float(step), SCHEMA, np.array([step, 2.0 * step])))
    sink.flush()
    directory.release()
    return tmp_path / "run"


def files(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "metrics").iterdir())


def test_a_crashed_run_becomes_one_file_with_every_value(ulysses: Ulysses, crashed: Path) -> None:
    before = um.open_run(crashed).metrics()
    info = (crashed / "run.json").read_text()
    assert len(files(crashed)) == 3
    code, out, error = ulysses("store", "compact", str(crashed))
    assert (code, error) == (0, "")
    assert out.startswith(f"{crashed}: 3 files")
    assert "-> 1 file," in out
    assert files(crashed) == ["metrics.parquet"]
    assert um.open_run(crashed).metrics().equals(before)
    assert (crashed / "run.json").read_text() == info
    assert ulysses("store", "compact", str(crashed))[0] == 0


def test_a_damaged_part_is_named_and_kept(ulysses: Ulysses, crashed: Path) -> None:
    part = crashed / "metrics" / files(crashed)[2]
    part.write_bytes(part.read_bytes()[:-20])
    code, _, error = ulysses("store", "compact", str(crashed))
    assert code == 0
    assert f"skipped damaged file metrics/{part.name}" in error
    assert {"metrics.parquet", part.name} < set(files(crashed))
    assert len(um.open_run(crashed).metrics()) == 15


def test_a_run_in_use_and_a_folder_without_a_run_are_refused(
    ulysses: Ulysses, crashed: Path
) -> None:
    writer = RunDirectory(crashed, "resume")
    before = files(crashed)
    code, _, error = ulysses("store", "compact", str(crashed))
    assert (code, error.count("\n")) == (2, 1)
    assert "in use by a running training" in error
    assert files(crashed) == before
    writer.release()
    code, _, error = ulysses("store", "compact", str(crashed.parent))
    assert (code, error.count("\n")) == (2, 1)
    assert "no run.json in this folder" in error
    assert sorted(p.name for p in crashed.parent.iterdir()) == ["run"]
