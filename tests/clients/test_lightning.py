"""Lightning: a program's `Trainer.fit` with our callback among its callbacks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.clients.case import RUN, Case, Client, Outcome
from tests.clients.conftest import Check
from tests.clients.programs import read_program

CLIENT = Client(
    "lightning",
    packages=("lightning==2.6.6", "transformers==5.23.0"),
)


def read_csv_logs(folder: Path) -> Outcome:
    """Reads what Lightning's own logger wrote; it counts optimizer steps from 0."""
    with (folder / "logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    column = "grad_2.0_norm_total"
    norms = {int(row["step"]) + 1: float(row[column]) for row in rows if row[column]}
    return Outcome(rows, norms)


def make_case(kind: str) -> Case:
    """Returns a case of one kind of fit."""
    command = ("python", "fit_lightning.py", kind)
    return Case(
        CLIENT,
        f"fit, {kind}",
        command=command,
        watched=(*command, RUN),
        files=read_program("fit_lightning.py"),
        read=read_csv_logs,
        weights=("weights.pt",),
    )


CASES = [make_case(k) for k in ("accumulation", "bf16", "manual", "ddp", "other namespace")]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fit_with_lightning_is_watched_exactly_and_is_not_changed(
    case: Case, check: Check
) -> None:
    check(case)
