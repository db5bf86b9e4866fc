"""Which rows a step trained on: every rank keeps it, and an alert names them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import ulysses_monitor as um
from tests.support.hf_cases import run_checks
from tests.support.row_cases import (
    FIRST_STEP,
    check_resumed_rows,
    check_trainer_rows,
    train_plain,
)
from tests.support.spawn import spawn
from ulysses_monitor.probes.fingerprints import hash_rows, row_losses
from ulysses_monitor.store import Location, read_steps


def run_trainers(root: str, engines: list[str]) -> dict[str, str]:
    words = run_checks({"rows": check_trainer_rows}, root, engines)
    return words | run_checks({"resumed": check_resumed_rows}, root, engines[:1])


def test_the_trainer_on_one_process_names_its_rows(tmp_path: Path) -> None:
    (words,) = spawn(run_trainers, 1, args=(str(tmp_path), ["plain"]))
    assert words == {"plain-rows": "", "plain-resumed": ""}


def test_trainers_on_two_processes_name_the_rows_of_both(tmp_path: Path) -> None:
    expected = dict.fromkeys(("ddp-rows", "zero2-rows", "zero3-rows", "ddp-resumed"), "")
    for words in spawn(run_trainers, 2, args=(str(tmp_path), ["ddp", "zero2", "zero3"])):
        assert words == expected


@pytest.mark.parametrize(
    ("engine", "processes"), [("plain", 1), ("accelerate", 1), ("ddp", 2), ("fsdp2", 2)]
)
def test_a_plain_loop_finds_the_broken_row_on_whichever_rank(
    tmp_path: Path, engine: str, processes: int
) -> None:
    results = spawn(train_plain, processes, args=(engine, str(tmp_path), 17, 12))
    ((owner, step),) = [(r, seen) for r, (seen, _) in enumerate(results) if seen]
    (alert,) = um.open_run(tmp_path / "run").event_list("alert")
    (event,) = um.open_run(tmp_path / "run").event_list("rows")
    assert alert["step"] == step
    assert {r["rank"] for r in alert["rows"]} == set(range(processes))
    (bad,) = [r for r in event["rows"] if r["index"] == 17]
    assert bad["rank"] == owner
    assert bad["hash"] in {r["hash"] for r in alert["rows"]}


def watched(folder: Path, **settings: Any) -> tuple[um.Monitor, nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    monitor = um.Monitor(folder, tensorboard=False, **settings)
    return monitor, model, torch.optim.SGD(model.parameters(), 0.01)


def test_the_files_stay_bounded_and_keep_the_latest_steps(tmp_path: Path) -> None:
    monitor, model, optimizer = watched(tmp_path / "run", rows=5, rules="off")
    with monitor.watch(model, optimizer):
        for step in range(40):
            if step % 3 == 0 and monitor.session is not None:
                monitor.session.rows.flush()
            model(torch.full((2, 4), float(step))).sum().backward()
            optimizer.step()
    steps = read_steps(Location.of(tmp_path / "run"))
    assert set(range(36, 41)) <= set(steps)
    assert len(steps) <= 10


def test_accumulated_micro_batches_and_losses_given_by_hand_are_all_there(tmp_path: Path) -> None:
    monitor, model, optimizer = watched(tmp_path / "run", rules=FIRST_STEP)
    with monitor.watch(model, optimizer):
        for _ in range(2):
            for part in range(3):
                x = torch.randn(2, 4)
                losses = model(x).square().flatten() + part
                monitor.observe(loss=losses.mean() / 3, batch=x, row_losses=losses)
                losses.mean().backward()
            optimizer.step()
    (event,) = um.open_run(tmp_path / "run").event_list("rows")
    rows = event["rows"]
    assert [r["micro_batch"] for r in sorted(rows, key=lambda r: r["micro_batch"])] == [
        *(0, 0, 1, 1, 2, 2)
    ]
    assert rows[0]["micro_batch"] == 2  # the highest loss first
    assert all(r["index"] is None and r["loss"] is not None for r in rows)


def test_a_row_with_a_loss_that_is_not_finite_comes_first(tmp_path: Path) -> None:
    monitor, model, optimizer = watched(tmp_path / "run")
    with monitor.watch(model, optimizer):
        x = torch.randn(3, 4)
        losses = model(x).flatten() * torch.tensor([1.0, float("nan"), 1.0])
        monitor.observe(loss=losses.mean(), batch=x, row_losses=losses)
        losses.mean().backward()
        optimizer.step()
    alert, *_ = [
        e for e in um.open_run(tmp_path / "run").event_list("alert") if e["rule"] == "nonfinite"
    ]
    assert len(alert["rows"]) == 3
    assert "loss nan" in alert["message"]


def test_random_numbers_and_the_order_of_rows_are_those_of_an_unwatched_loop(
    tmp_path: Path,
) -> None:
    def run(path: Path | None, workers: int) -> tuple[list[list[int]], float, float]:
        torch.manual_seed(3)
        random.seed(3)
        data = [torch.full((4,), float(i)) for i in range(12)]
        loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)  # type: ignore[arg-type]
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        order = []
        monitor = um.Monitor(path, tensorboard=False) if path else None
        watch = monitor.watch(model, optimizer, loader=loader) if monitor else None
        if watch:
            watch.__enter__()
        for _ in range(2):
            for x in loader:
                order.append(x[:, 0].int().tolist())
                model(x).sum().backward()
                optimizer.step()
        if watch:
            watch.__exit__(None, None, None)
        return order, torch.rand(1).item(), random.random()

    for workers in (0, 1):
        path = tmp_path / f"run{workers}"
        order, *_ = watched_run = run(path, workers)
        assert watched_run == run(None, workers)
        steps = read_steps(Location.of(path))
        assert [[r.index for r in steps[s]] for s in sorted(steps)] == order


class Eager:
    """A batch sampler that draws its random numbers when it is asked for its iterator."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(12).tolist()
        return iter([order[i : i + 3] for i in range(0, 12, 3)])

    def __len__(self) -> int:
        return 4


def test_two_monitors_know_the_rows_of_one_loader_whose_sampler_draws_at_once(
    tmp_path: Path,
) -> None:
    data = [torch.full((4,), float(i)) for i in range(12)]

    def draw() -> tuple[list[list[int]], float]:
        loader: Any = DataLoader(data, batch_sampler=Eager())  # type: ignore[arg-type]
        monitors = [watched(tmp_path / name, rules="off") for name in ("one", "two")]
        torch.manual_seed(4)
        (first, model, optimizer), (second, *_) = monitors
        with (
            first.watch(model, optimizer, loader=loader),
            second.watch(model, optimizer, loader=loader),
        ):
            order = []
            for x in loader:
                order.append(x[:, 0].int().tolist())
                model(x).sum().backward()
                optimizer.step()
        return order, torch.rand(1).item()

    order, after = draw()
    torch.manual_seed(4)
    bare = [
        x[:, 0].int().tolist()
        for x in DataLoader(data, batch_sampler=Eager())  # type: ignore[arg-type, arg-type]
    ]
    assert (order, after) == (bare, torch.rand(1).item())
    for name in ("one", "two"):
        steps = read_steps(Location.of(tmp_path / name))
        assert [[r.index for r in steps[s]] for s in sorted(steps)] == order


def test_a_batch_that_cannot_be_read_costs_nothing_but_its_rows(tmp_path: Path) -> None:
    class Odd(dict[str, Any]):
        def values(self) -> Any:
            raise RuntimeError("no values")

    monitor, model, optimizer = watched(tmp_path / "run", rules="off")
    with monitor.watch(model, optimizer):
        for _ in range(5):
            monitor.observe(loss=1.0, batch=Odd(a=1))
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    run = um.open_run(tmp_path / "run")
    assert len(run.metrics("grad/norm/total")) == 5
    events = run.event_list("monitor")
    assert [(e["part"], e["state"]) for e in events] == [
        ("fingerprints of rows", "failed"),
        ("fingerprints of rows", "off"),
    ]


@pytest.mark.parametrize("value", [-1, 1.5, "many"])
def test_a_wrong_number_of_steps_is_one_line(value: Any) -> None:
    with pytest.raises(um.InputError, match="rows"):
        um.Monitor("unused", rows=value)


def test_lines_that_a_killed_writer_left_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    line = json.dumps([3, [[0, 7, 99, 12, None, 1.5]]])
    (folder / "rank-0.jsonl").write_text(f"{line}\n[4,[[0,8\n{line.replace('7', '9')}\n")
    (row,) = read_steps(Location.of(tmp_path))[3]
    assert (row.index, row.hash, row.trained) == (9, "0000000000063", None)


def test_losses_of_rows_are_those_of_each_row_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    labels[0, 2:], labels[2] = -100, -100
    losses = row_losses(logits, labels)
    assert losses is not None
    for i in range(2):
        alone = nn.functional.cross_entropy(logits[i, :-1], labels[i, 1:])
        assert losses[i].item() == pytest.approx(alone.item(), abs=1e-6)
    assert losses[2] == -torch.inf  # no label, no loss
    assert row_losses(logits[:, :4], labels) is None
    assert row_losses(None, labels) is None


def test_a_hash_depends_on_tokens_and_their_order_and_not_on_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [0, 5, 6, 7], [6, 5, 7, 0], [5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    left, right, other, longer = hash_rows(ids, mask).tolist()
    assert left == right == hash_rows(torch.tensor([[5, 6, 7]])).item()
    assert len({left, other, longer}) == 3
    assert hash_rows(torch.tensor([[5, 6, 7, 0]])).item() == longer
    assert len(set(hash_rows(torch.randn(500, 3)).tolist())) == 500
