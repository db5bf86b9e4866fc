"""Processes, clocks, memory and collectives for benchmarks of parallel code."""

from __future__ import annotations

import os
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = [
    "Collectives",
    "backward",
    "on_first_rank",
    "peak_growth",
    "seconds_of",
    "share_of_cores",
    "start",
]


def start(
    rank_main: Callable[..., None], ranks: int, arguments: Any, threads: int | None = None
) -> None:
    """Runs ``rank_main(arguments, device)`` on `ranks` processes, with NCCL if there are GPUs.

    Args:
        rank_main: what each process runs.
        ranks: number of processes.
        arguments: handed to each.
        threads: of each process; an equal share of the cores if None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    args = (rank_main, ranks, port, arguments, threads or share_of_cores(ranks))
    mp.start_processes(_enter, args, nprocs=ranks, start_method="spawn")


def share_of_cores(ranks: int) -> int:
    """Threads of each of `ranks` processes."""
    return max(1, (os.cpu_count() or 1) // ranks)


def _enter(
    rank: int, rank_main: Callable[..., None], ranks: int, port: str, args: Any, threads: int
) -> None:
    cuda = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(threads)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=ranks)
    rank_main(args, device)
    dist.destroy_process_group()


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    """Returns the seconds that the slowest rank takes; all begin together."""
    dist.barrier()
    _sync(device)
    began = time.perf_counter()
    call()
    _sync(device)
    taken = torch.tensor([time.perf_counter() - began], device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def backward(out: Tensor) -> None:
    """Runs the backward pass from a gradient of ones."""
    out.backward(torch.ones_like(out))


def on_first_rank(call: Callable[[], None], ranks: int) -> Callable[[], None]:
    """Makes `call` run on rank 0 with the threads of all ranks, while the others wait."""

    def alone() -> None:
        if dist.get_rank() == 0:
            threads = torch.get_num_threads()
            torch.set_num_threads(threads * ranks)
            call()
            torch.set_num_threads(threads)

    return alone


def peak_growth(call: Callable[[], None], device: torch.device) -> int:
    """Returns the most bytes that new tensors take at a time during `call`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive() as alive:
        call()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Follows the storages that operations return; the process's own size says less."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if _is_plain(t)}
        for tensor in tree_iter(result):
            if _is_plain(tensor) and tensor.untyped_storage()._cdata not in given | self._seen:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._seen.add(key)
        self._alive += size
        self.peak = max(self.peak, self._alive)

        def gone() -> None:
            self._alive -= size
            self._seen.discard(key)

        weakref.finalize(storage, gone)


def _is_plain(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter)


class Collectives:
    """Counts this rank's collectives and the bytes that it hands to them."""

    _NAMES = ("all_to_all_single", "all_gather", "all_gather_into_tensor", "all_reduce")

    def __init__(self) -> None:
        self.count = self.bytes = 0
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> Collectives:
        for name in self._NAMES:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counted(self._originals[name], name != "all_reduce"))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counted(self, original: Any, second: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            given = [*args, *kwargs.values()]
            self.bytes += given[1 if second else 0].nbytes
            return original(*args, **kwargs)

        return call
