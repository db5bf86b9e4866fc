"""Trainings whose rows are known, and what the monitor says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ulysses_monitor as um
from tests.support.hf_cases import build_trainer, rank, weights, world
from ulysses_monitor.probes.fingerprints import hash_rows
from ulysses_monitor.store import Location, read_steps

__all__ = [
    "FIRST_STEP",
    "check_resumed_rows",
    "check_trainer_rows",
    "train_loop",
    "train_plain",
    "words_of",
]

FIRST_STEP = [{"train/loss/total > 0": {"name": "first", "cooldown": 1000, "clear": 1000}}]
"""A rule that raises one alert, at step 1."""


def words_of(ids: Tensor) -> str:
    """Returns the hash of a row of token ids as events have it."""
    return f"{int(hash_rows(ids.unsqueeze(0))):013x}"


def check_trainer_rows(engine: str, folder: Path) -> None:
    """The alert, the event and the files of all ranks name the rows that were trained on."""
    monitor = um.Monitor(folder / "run", tensorboard=False, rules=FIRST_STEP)
    trainer = build_trainer(engine, folder)
    losses = _losses_by_index(trainer) if engine != "zero3" else {}
    monitor.attach(trainer)
    trainer.train()
    with_rows = weights(trainer)
    plain = build_trainer(engine, folder)
    unwatched = um.Monitor(folder / "off", tensorboard=False, rules="off", rows="off")
    unwatched.attach(plain)
    plain.train()
    assert all(torch.equal(value, weights(plain)[name]) for name, value in with_rows.items())
    if rank() != 0:
        return
    assert not (unwatched.run_dir / "rows").exists()
    run = um.open_run(folder / "run")
    (alert,) = run.event_list("alert")
    (event,) = run.event_list("rows")
    assert (alert["step"], event["step"]) == (1, 1)
    assert event["ranks"] == event["ranks_told"] == world()
    # 2 rows in each of 2 micro-batches on every rank; the alert has the worst of them.
    rows = event["rows"]
    assert len(rows) == 4 * world()
    assert alert["rows"] == rows[:16]
    assert sorted((r["rank"], r["micro_batch"]) for r in rows) == sorted(
        (r, m) for r in range(world()) for m in (0, 1) for _ in range(2)
    )
    assert len({r["index"] for r in rows}) == len(rows)
    data = trainer.train_dataset
    for row in rows:
        assert row["hash"] == words_of(data[row["index"]]["input_ids"])
        assert (row["length"], row["trained"]) == (9, 8)
        if losses:
            assert abs(row["loss"] - losses[row["index"]]) < 1e-5
    assert [r["loss"] for r in rows] == sorted((r["loss"] for r in rows), reverse=True)
    assert f"row {rows[0]['index']} " in alert["message"]
    files = sorted(path.name for path in (folder / "run" / "rows").iterdir())
    assert files == [f"rank-{r}.jsonl" for r in range(world())]
    for path in (folder / "run" / "rows").iterdir():
        assert len(path.read_text().splitlines()) == 4


def _losses_by_index(trainer: Any) -> dict[int, float]:
    """Computes the loss of each row alone, with the first weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        return {
            i: float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss)
            for i, row in enumerate(trainer.train_dataset)
        }


def train_plain(engine: str, folder: str, bad: int, steps: int) -> list[int]:
    """A loop of one's own, with one broken row.

    Returns:
        The step at which this rank saw the broken row, and the number of batches drawn.
    """
    torch.manual_seed(0)
    values = torch.randn(24, 4)
    values[bad] *= 1e4
    data = TensorDataset(values, torch.randn(24, 1))
    sampler = DistributedSampler(data, seed=5) if world() > 1 else None
    loader = DataLoader(data, batch_size=2, sampler=sampler, num_workers=0)
    model: Any = nn.Linear(4, 1)
    if engine == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world(),)))
    elif engine == "accelerate":
        from accelerate import Accelerator

        model, loader = Accelerator(cpu=True).prepare(model, loader)
    seen = train_loop(folder, model, loader, values[bad], steps)
    return [seen, len(loader)]


def train_loop(folder: str, model: Any, loader: Any, bad: Tensor, steps: int) -> int:
    """Trains; returns the step at which the row `bad` was among the rows, 0 if it was not."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-12)
    rules = [{"grad/norm/total > 1000": {"name": "spike"}}]
    monitor = um.Monitor(Path(folder, "run"), tensorboard=False, rules=rules)
    seen = 0
    with monitor.watch(model, optimizer, loader=loader):
        for step, (x, y) in enumerate(loader, 1):
            if bool((x == bad).all(dim=1).any()):
                seen = step
            loss = (model(x) - y).square().mean()
            monitor.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == steps:
                break
    return seen


def check_resumed_rows(engine: str, folder: Path) -> None:
    """A training that resumes inside an epoch knows which rows come next."""

    def train(**more: Any) -> None:
        monitor = um.Monitor(folder / "run", tensorboard=False, rules="off")
        settings = {"save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 1}
        trainer = build_trainer(engine, folder, **settings, max_steps=more.pop("steps"))
        monitor.attach(trainer)
        trainer.train(**more)

    train(steps=2)
    train(steps=4, resume_from_checkpoint=True)
    whole = um.Monitor(folder / "whole", tensorboard=False, rules="off")
    trainer = build_trainer(engine, folder)
    whole.attach(trainer)
    trainer.train()
    if rank() == 0:
        found, expected = (read_steps(Location.of(folder / name)) for name in ("run", "whole"))
        assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
        for step, rows in expected.items():
            assert [(r.index, r.hash) for r in found[step]] == [(r.index, r.hash) for r in rows]
            assert all(r.index is not None for r in rows)
