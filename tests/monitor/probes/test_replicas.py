"""The monitor detects replicas that differ, whatever differs and however little."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ulysses_monitor as um
from tests.support.exact_cases import MODELS, Case, batches
from tests.support.exact_engines import merged, wrap
from tests.support.spawn import spawn


def drifting(engine: str, what: str, folder: str) -> dict[str, Any]:
    """Takes four steps, and changes one element on the last rank after the second."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    model = MODELS["toy"]()
    wrapped, optimizer, _ = wrap(model, Case(engine=engine))
    sink = um.MemorySink()
    monitor = um.Monitor(folder, tensorboard=False, sinks=[sink], sample_every=1)
    with monitor.watch(wrapped, optimizer):
        for step in range(4):
            (ids,) = batches(step, world, 1)[rank]
            odd = rank == world - 1 and step == 2
            if odd and what == "param":
                local = getattr(
                    model.head.weight.data, "to_local", lambda: model.head.weight.data
                )()
                local[0, 0] = torch.nextafter(local[0, 0], torch.tensor(9.0))
            if engine.startswith("zero"):
                wrapped.backward(wrapped(ids))
                wrapped.step()
                continue
            wrapped(ids).backward()
            if odd and what == "grad":
                model.head.bias.grad[0] += 1e-7
            optimizer.step()
            optimizer.zero_grad()
    alerts = []
    if rank == 0:
        events = um.open_run(folder).events("alert")
        alerts = [] if events.empty else events["message"].tolist()
    return {"records": merged(sink), "alerts": alerts}


@pytest.mark.parametrize(
    ("engine", "world", "what"),
    [
        ("ddp", 3, "param"),
        ("ddp", 3, "grad"),
        ("zero0", 2, "param"),
        ("zero2", 3, "param"),
        ("hsdp", 4, "param"),
    ],
)
def test_one_flipped_bit_shows_at_the_next_reading(
    engine: str, world: int, what: str, tmp_path: Path
) -> None:
    found = spawn(drifting, world, args=[engine, what, str(tmp_path / "run")], timeout=60)[0]
    name = {"param": "head.weight", "grad": "head.bias"}[what]
    before = [record[f"{what}/mismatch/total"] for record in found["records"][:2]]
    assert before == [0.0, 0.0]
    assert all(math.isnan(record["param/odd_rank/total"]) for record in found["records"][:2])
    odd = found["records"][2]
    assert odd[f"{what}/mismatch/total"] >= 1.0
    assert odd[f"{what}/mismatch/param/{name}"] == 1.0
    assert odd["param/odd_rank/total"] == world - 1
    assert any("copies of" in alert and name in alert for alert in found["alerts"])
    assert any(f"rank {world - 1} differs from the others" in alert for alert in found["alerts"])
