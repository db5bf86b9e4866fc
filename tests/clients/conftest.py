from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.case import Case
from tests.clients.comparison import (
    BOUND,
    compare_norms,
    compare_weights,
    differing_lines,
    run_case,
)
from tests.clients.environments import ROOT, prepare
from tests.clients.page import TableRow, format_table, write_page

Check = Callable[[Case], None]
PAGE = ROOT / "docs" / "clients.md"
_ROWS = pytest.StashKey[list[TableRow]]()
_WORDS = {True: "equal", False: "DIFFERENT"}


def clients_folder() -> Path:
    """The folder of the clients' environments: ULYSSES_CLIENTS_DIR, or .venv/clients."""
    return Path(os.environ.get("ULYSSES_CLIENTS_DIR") or Path(sys.prefix, "clients")).absolute()


@pytest.fixture
def check(request: pytest.FixtureRequest, tmp_path: Path) -> Check:
    """Runs a case without and with the monitor, adds its row to the table, and compares."""

    def run(case: Case) -> None:
        package = case.client.package
        environment = prepare(case.client, clients_folder() / (case.client.folder or package))
        plain, watched = run_case(case, environment, tmp_path)
        numbers = plain.outcome.numbers == watched.outcome.numbers
        weights, error = compare_weights(case, plain, watched), compare_norms(watched)
        row = TableRow(
            package,
            environment.versions()[package.lower()],
            case.variant,
            _WORDS[numbers],
            _WORDS[weights],
            f"{error:.1e}",
            f"{plain.seconds:.1f}",
            f"{watched.seconds:.1f}",
        )
        request.config.stash.setdefault(_ROWS, []).append(row)
        assert plain.outcome.numbers == watched.outcome.numbers
        assert weights, "the weights differ, or there are none"
        assert error <= BOUND
        assert not (lines := differing_lines(case, plain, watched)), "\n".join(lines)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table, and keeps it in the documentation."""
    rows = terminalreporter.config.stash.get(_ROWS, [])
    if rows:
        write_page(PAGE, rows)
        terminalreporter.write(f"\n{format_table(rows)}")
