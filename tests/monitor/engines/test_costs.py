"""A reading costs one collective, one copy to the host, and no temporary as large as the model."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import ulysses_monitor as um
from tests.support.exact_cases import Case, llama
from tests.support.exact_engines import wrap
from tests.support.spawn import spawn

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")
"""Operations that make the host wait for a GPU."""


class Watcher(TorchDispatchMode):
    """Counts operations, and the bytes of new storages that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.peak = self.alive = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        for tensor in tree_iter(result):
            if is_tensor(tensor) and tensor.untyped_storage()._cdata not in given | self._seen:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def gone() -> None:
            self.alive -= size
            self._seen.discard(key)

        weakref.finalize(storage, gone)


def is_tensor(value: Any) -> bool:
    return type(value) in (torch.Tensor, nn.Parameter)


def watched_steps(engine: str, adapters: bool, width: int, bad: bool) -> list[dict[str, int]]:
    """Returns what this rank did to read each of four steps; steps 1 and 3 are sampled."""
    import tempfile

    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    model = model_of(adapters, width)
    wrapped, optimizer, _ = wrap(model, Case(engine=engine))
    copies: list[int] = []
    found = []
    to_host = torch.Tensor.cpu

    def counting_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copies.append(1)
        return to_host(self, *args, **kwargs)

    monitor = um.Monitor(tempfile.mkdtemp() + "/run", tensorboard=False, sample_every=2)
    with monitor.watch(wrapped, optimizer):
        capture = monitor.session._capture
        read, finish_step = capture.read, capture.finish_step

        def watched_read(*args: Any) -> Any:
            watcher, before = Watcher(), len(copies)
            torch.Tensor.cpu = counting_cpu  # type: ignore[method-assign]
            try:
                with watcher:
                    result = read(*args)
            finally:
                torch.Tensor.cpu = to_host  # type: ignore[method-assign]
            found.append(summary(watcher, len(copies) - before))
            return result

        def watched_finish(done: bool) -> None:
            watcher = Watcher()
            with watcher:
                finish_step(done)
            found[-1]["peak"] = max(found[-1]["peak"], watcher.peak)
            found[-1]["collectives"] += summary(watcher, 0)["collectives"]
            found[-1]["waits"] += summary(watcher, 0)["waits"]

        capture.read, capture.finish_step = watched_read, watched_finish
        for _ in range(4):
            loss = wrapped(torch.ones(2, width)) if not adapters else adapter_loss(wrapped)
            if engine.startswith("zero"):
                wrapped.backward(loss)
                wrapped.step()
                continue
            loss.backward()
            if bad:
                next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = (
                    torch.inf
                )
            optimizer.step()
            optimizer.zero_grad()
    return found


def summary(watcher: Watcher, copies: int) -> dict[str, int]:
    names = watcher.operations
    return {
        "collectives": sum(
            n
            for name, n in names.items()
            if name.startswith(("all", "reduce_"))
            and name.endswith(("reduce_", "gather_", "scatter_", "base_", "all_"))
        ),
        "copies": copies,
        "waits": sum(names[name] for name in WAITS),
        "peak": watcher.peak,
    }


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def model_of(adapters: bool, width: int) -> nn.Module:
    if not adapters:
        return Wide(width)
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))


def adapter_loss(wrapped: Any) -> torch.Tensor:
    ids = torch.ones(1, 7, dtype=torch.long)
    return wrapped(input_ids=ids, labels=ids).loss


ENGINES = ("ddp", "zero0", "zero2", "zero2-offload", "zero3", "fsdp2")
SMALL = [(engine, adapters, 64, False) for engine in ENGINES for adapters in (False, True)]
LARGE = [(engine, False, 3072, False) for engine in ("ddp", "zero2", "zero3", "fsdp2")]
BAD = ("ddp", False, 64, True)


def all_watched(cases: list[list[Any]]) -> list[list[dict[str, int]]]:
    return [watched_steps(*case) for case in cases]


@pytest.fixture(scope="module")
def steps() -> dict[tuple[Any, ...], list[list[dict[str, int]]]]:
    """Maps each case to the steps of each rank."""
    cases = [*SMALL, *LARGE, BAD]
    of_ranks = spawn(all_watched, 2, args=[[list(case) for case in cases]], timeout=200)
    return {case: [rank[i] for rank in of_ranks] for i, case in enumerate(cases)}


@pytest.mark.parametrize("case", SMALL, ids=lambda c: f"{c[0]}-{'lora' if c[1] else 'full'}")
def test_a_step_needs_one_collective_and_one_copy_and_never_waits(steps: dict, case: Any) -> None:
    for of_rank in steps[case]:
        assert [step["collectives"] for step in of_rank] == [1, 1, 1, 1]
        assert [step["copies"] for step in of_rank] == [1, 1, 1, 1]
        assert [step["waits"] for step in of_rank] == [0, 0, 0, 0]


def test_one_process_needs_no_collective() -> None:
    (found,) = spawn(watched_steps, 1, args=["plain", False, 64, False], timeout=60)
    assert [(s["collectives"], s["copies"], s["waits"]) for s in found] == [(0, 1, 0)] * 4


def test_a_step_with_an_infinite_gradient_takes_a_second_reading(steps: dict) -> None:
    for of_rank in steps[BAD]:
        assert [step["collectives"] for step in of_rank] == [2, 2, 2, 2]
        assert [step["copies"] for step in of_rank] == [2, 2, 2, 2]
        assert [step["waits"] for step in of_rank] == [0, 0, 0, 0]


@pytest.mark.parametrize("case", LARGE, ids=lambda c: c[0])
def test_no_temporary_is_as_large_as_the_parameters(steps: dict, case: Any) -> None:
    """The model has 2 x 36 MiB of parameters; a rank holds half of them if they are sharded."""
    for of_rank in steps[case]:
        assert all(0 < step["peak"] < 12 << 20 for step in of_rank)
