"""The rows of a step under sequence parallelism: whole ones, and each once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import ulysses_core as uc
import ulysses_monitor as um
from tests.support.forget import forget_last_trainer
from tests.support.row_cases import FIRST_STEP, words_of
from tests.support.sequence_cases import Case, build_trainer
from tests.support.spawn import spawn


def train(cases: list[dict[str, Any]]) -> list[Any]:
    """The child: returns the rows of the first step and the names of the files; see the test."""
    told = []
    for settings in cases:
        folder = Path(tempfile.gettempdir(), f"rows-{len(told)}")
        trainer = build_trainer(Case(**settings))
        uc.sequence_parallel(trainer, 2)
        monitor = um.Monitor(folder / "run", tensorboard=False, rules=FIRST_STEP)
        monitor.attach(trainer)
        trainer.train()
        rows, hashes = [], []
        if not torch.distributed.get_rank():
            run = um.open_run(monitor.run_dir)
            (event,) = run.event_list("rows")
            (loss,) = run.metrics("train/loss/total").loc[1]
            rows = [*event["rows"], loss]
            data = trainer.train_dataset
            hashes = [words_of(torch.as_tensor(row["input_ids"])) for row in data]
        told.append([rows, hashes])
        forget_last_trainer()
    return told


def test_a_sequence_group_names_its_whole_rows_once() -> None:
    cases = [{"rows": 3}, {"rows": 1, "zero": 2}]
    (first, second), others = spawn(train, 2, args=(cases,), timeout=240)
    assert others == [[[], []], [[], []]]
    (*rows, _), hashes = first
    assert len(rows) == 3
    for row in rows:
        assert row["rank"] == 0
        assert row["hash"] == hashes[row["index"]]
        assert row["loss"] is None  # no rank has the logits of whole rows
    (*rows, loss), hashes = second
    (row,) = rows
    assert row["hash"] == hashes[row["index"]]
    assert abs(row["loss"] - loss) < 1e-9  # a row alone has the loss of its micro-batch
