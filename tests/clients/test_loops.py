"""Loops of one's own: plain, in Ray Train's workers, with parts of torchtitan."""

from __future__ import annotations

import pytest

from tests.clients.case import RUN, Case, Client
from tests.clients.conftest import Check
from tests.clients.programs import read_log, read_program
from tests.clients.test_transformers import CLIENT as TRANSFORMERS

RAY = Client("ray", packages=("ray[train]==2.60.0",), has_transformers=False)
TORCHTITAN = Client("torchtitan", packages=("torchtitan==0.3.0",), has_transformers=False)


def make_case(client: Client, variant: str, program: str) -> Case:
    """Returns a case of a program that watches itself if it is given a run directory."""
    return Case(
        client,
        variant,
        command=("python", program),
        watched=("python", program, RUN),
        files=read_program(program),
        read=read_log,
        weights=("weights.pt",),
    )


CASES = [
    make_case(TRANSFORMERS, "plain loop", "loop_plain.py"),
    make_case(RAY, "loop, 2 workers", "train_ray.py"),
    make_case(TORCHTITAN, "loop, its clipping and loggers", "loop_torchtitan.py"),
]


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_loop_is_watched_exactly_and_is_not_changed(case: Case, check: Check) -> None:
    check(case)
