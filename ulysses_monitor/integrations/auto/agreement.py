"""Lets the ranks agree on whether to watch a training, without a collective.

A rank that is not attached (its node was started without `ulysses attach`, or lacks a package)
would never join a collective, and the training would hang. So the ranks vote through the key-value
store of their rendezvous, and wait for a vote for a limited time.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.ranks import rank, world_size

__all__ = ["NotAttachedError", "agree"]

_ADVICE = "start the command with `ulysses attach` on each node"
_POLL_SECONDS = 0.02


class NotAttachedError(InputError):
    """Some rank is not attached; the others train without the monitor."""


def agree(question: str, vote: str, patience: float = 60.0) -> str:
    """Puts a question to all ranks.

    Args:
        question: its name, the same on all ranks, and a new one each time.
        vote: this rank's answer.
        patience: seconds that rank 0 waits for the others; they wait twice that for its verdict.

    Returns:
        The answer that all ranks gave; if they differ, the one that differs from rank 0's.

    Raises:
        NotAttachedError: some rank does not answer; raised on each rank that does.
    """
    if world_size() == 1:
        return vote
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{question}/{rank()}", vote)
    if rank() == 0:
        store.set(f"{question}/verdict", _verdict(store, question, vote, patience))
    if _missing(store, [f"{question}/verdict"], 2 * patience):
        raise NotAttachedError(f"rank 0 is not attached; {_ADVICE}")
    kind, _, text = store.get(f"{question}/verdict").decode().partition(":")
    if kind == "error":
        raise NotAttachedError(text)
    return str(text)


def _verdict(store: Any, question: str, vote: str, patience: float) -> str:
    votes = [f"{question}/{r}" for r in range(world_size())]
    if missing := _missing(store, votes, patience):
        return f"error:{len(missing)} of {len(votes)} ranks are not attached; {_ADVICE}"
    answers = [store.get(name).decode() for name in votes]
    return "answer:" + next((a for a in answers if a != vote), vote)


def _missing(store: Any, keys: list[str], patience: float) -> list[str]:
    """Waits for keys and returns those that do not arrive.

    It polls: a `wait` that times out leaves its answer in the connection, which torch still needs.
    """
    deadline = time.monotonic() + patience
    while not store.check(keys):
        if time.monotonic() > deadline:
            return [key for key in keys if not store.check([key])]
        time.sleep(_POLL_SECONDS)
    return []
