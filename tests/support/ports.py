"""TCP ports that no one else gets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["free_port", "reserve_port"]

_held: list[socket.socket] = []


@contextmanager
def reserve_port() -> Iterator[int]:
    """Yields a free port of 127.0.0.1 and keeps it reserved.

    A socket stays bound to it, so the system gives the port to nobody who asks for any; a server
    that asks for this one, with SO_REUSEADDR as servers do, may listen on it.
    """
    with socket.socket() as held:
        yield _bind(held)


def free_port() -> int:
    """Returns a port that stays reserved, as `reserve_port` does it, until this process ends."""
    _held.append(socket.socket())
    return _bind(_held[-1])


def _bind(held: socket.socket) -> int:
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return int(held.getsockname()[1])
