"""Sequence parallelism for the Trainers of TRL that sample their rows (GRPO, RLOO).

The ranks of a sequence group train on the same prompts and the same sampled answers. Every rank
samples, because engines communicate meanwhile, without sequence parallelism; the answers of the
group's first rank count. Where TRL asks which process it is in and gathers over processes, it is
told of groups, so that each answer counts once.

Legend: W ranks, n ranks of a group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor
from transformers import Trainer

from ulysses_core.parallel.groups import SequenceGroup
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.patching import Undo, patch_method, undo_all

__all__ = ["check_sampling", "samples_rows", "select_groups", "share_samples"]


def samples_rows(trainer: Trainer) -> bool:
    """Returns whether a Trainer samples the rows that it trains on, as TRL's do."""
    return hasattr(trainer, "_generate_and_score_completions")


def check_sampling(trainer: Any, group: SequenceGroup) -> None:
    """Refuses settings of a sampling Trainer that do not suit its sequence groups.

    Raises:
        InputError: the setting, and what to change.
    """
    args = trainer.args
    if getattr(args, "use_vllm", False):
        raise InputError(
            "sequence parallel: use_vllm is true; expected false, because vLLM samples rows for "
            "each process, not for each sequence group"
        )
    answers = args.generation_batch_size // group.size
    if answers % args.num_generations:
        raise InputError(
            f"sequence parallel: num_generations is {args.num_generations}; expected a divisor of "
            f"{answers}, the answers that all sequence groups sample at a time "
            "(per_device_train_batch_size times steps_per_generation times groups)"
        )
    of_eval = trainer.num_generations_eval
    rows = args.per_device_eval_batch_size * group.data_size
    if trainer.eval_dataset is not None and rows % of_eval:
        raise InputError(
            f"sequence parallel: per_device_eval_batch_size is {args.per_device_eval_batch_size}, "
            f"in all sequence groups {rows}; expected a multiple of the {of_eval} answers to a "
            "prompt"
        )


def share_samples(trainer: Any, group: SequenceGroup) -> Undo:
    """Makes the ranks of a group sample the same answers, and count them once; see the module."""
    undos = [
        _set(
            trainer.args, "generation_batch_size", trainer.args.generation_batch_size // group.size
        ),
        patch_method(trainer, "_generate", _Shared(group).generate),
    ]
    as_groups = _as_groups(trainer, group)
    undos += [
        patch_method(trainer, name, as_groups) for name in ("_prepare_inputs", "compute_loss")
    ]
    return lambda: undo_all(undos)


def select_groups(data: Any, ranks: int, group: SequenceGroup) -> Any:
    """Returns what one rank of each group gave to a gathered tensor [W * rows, ...]."""

    def select(gathered: Tensor) -> Tensor:
        # [W * rows, ...] -> [W / n, rows, ...] -> [W / n * rows, ...]
        selected: Tensor = gathered.unflatten(0, (ranks, -1))[:: group.size].flatten(0, 1)
        return selected

    return recursively_apply(select, data)


def _set(owner: Any, name: str, value: Any) -> Undo:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


class _GroupAccelerator:
    """An accelerator whose processes are the sequence groups; all else is the original's."""

    def __init__(self, accelerator: Any, group: SequenceGroup) -> None:
        self._accelerator, self._group = accelerator, group
        self.process_index, self.num_processes = group.data_rank, group.data_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, data: Any) -> Any:
        """Gathers from one rank of each group."""
        ranks = self._accelerator.num_processes
        return select_groups(self._accelerator.gather(data), ranks, self._group)

    def reduce(self, tensor: Tensor, reduction: str = "sum", **more: Any) -> Tensor:
        """Reduces over groups; the ranks of a group have the same numbers."""
        reduced: Tensor = self._accelerator.reduce(tensor, reduction=reduction, **more)
        return reduced / self._group.size if reduction == "sum" else reduced


class _Shared:
    """Wrappers of what TRL calls while it samples; each passes on what the first rank has."""

    def __init__(self, group: SequenceGroup) -> None:
        self._group = group

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the answers that the group's first rank sampled."""
        shared = [original(*args, **kwargs)]
        dist.broadcast_object_list(shared, group=self._group.group, group_src=0)
        return shared[0]

    def gather(self, original: Callable[..., Any], data: Any, *_: Any) -> Any:
        """Gathers tensors from one rank of each group."""
        return select_groups(original(data), dist.get_world_size(), self._group)

    def gather_object(self, original: Callable[..., Any], data: list[Any], *_: Any) -> Any:
        """Gathers lists of objects from one rank of each group."""
        return original(data if self._group.rank == 0 else [])

    def shuffle(self, original: Callable[..., Any], *args: Any) -> Any:
        """Shuffles the answers as the group's first rank does."""
        state = torch.get_rng_state()
        shared = state.to(_device(self._group))
        dist.broadcast(shared, group=self._group.group, group_src=0)
        if self._group.rank == 0:
            return original(*args)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(shared.cpu())
            return original(*args)


def _device(group: SequenceGroup) -> torch.device:
    """Returns where tensors are that the group communicates."""
    accelerator = torch.accelerator.current_accelerator()
    is_gloo = dist.get_backend(group.group) == "gloo"
    return torch.device("cpu") if is_gloo or accelerator is None else accelerator


def _as_groups(trainer: Any, group: SequenceGroup) -> Callable[..., Any]:
    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _counting_groups(trainer, group):
            return original(*args, **kwargs)

    return call


@contextmanager
def _counting_groups(trainer: Any, group: SequenceGroup) -> Iterator[None]:
    """Lets the trainer take sequence groups for processes.

    TRL's modules call functions of their own namespace, which no instance holds; they are patched
    while this trainer runs them.
    """
    shared = _Shared(group)
    wrappers = {
        "gather": shared.gather,
        "gather_object": shared.gather_object,
        "shuffle_sequence_dict": shared.shuffle,
    }
    names = {kind.__module__ for kind in type(trainer).__mro__}
    modules = [sys.modules[name] for name in names if name.startswith("trl.")]
    undos = [
        patch_method(module, name, wrapper)
        for module in modules
        for name, wrapper in wrappers.items()
        if hasattr(module, name)
    ]
    undos.append(_set(trainer, "accelerator", _GroupAccelerator(trainer.accelerator, group)))
    try:
        yield
    finally:
        undo_all(undos)
