"""A long, wide run is reported and replayed in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reading import COMMANDS, OWN_RULE, ROOT, measure, write_run

MAX_MEGABYTES = 300


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", ["parts", "compacted"])
@pytest.mark.parametrize("layers", [32, 300])
def test_a_run_of_30_000_steps_and_2_000_metrics_is_read_in_300_megabytes(
    tmp_path: Path, layers: int, form: str
) -> None:
    write_run(tmp_path / "run", layers, 30_000, 2_000, form)
    (tmp_path / "own_rule.py").write_text(OWN_RULE)
    for command in COMMANDS.values():
        peak, _ = measure(ROOT, tmp_path, [*command, "run"])
        assert peak <= MAX_MEGABYTES, command


@pytest.mark.parametrize("form", ["parts", "compacted"])
def test_the_benchmark_runs_each_command_on_each_form(tmp_path: Path, form: str) -> None:
    write_run(tmp_path / "run", 3, 30, 40, form)
    (tmp_path / "own_rule.py").write_text(OWN_RULE)
    for command in COMMANDS.values():
        assert min(measure(ROOT, tmp_path, [*command, "run"])) > 0
