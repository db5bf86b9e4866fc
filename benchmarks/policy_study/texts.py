"""What models read: text of the installed Python's standard library, and drawn digits."""

from __future__ import annotations

import ast
import functools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["SIDE", "digits", "rows_of", "text_of"]

HELD_OUT = 10
"""Every tenth file is kept for evaluation."""
PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "json", "unittest")
"""Those whose source code is a text."""
SIDE = 8
"""Pixels of a side of a picture."""
GLYPHS = (
    "111101101101111 010110010010111 111001111100111 111001111001111 101101111001001 "
    "111100111001111 111100111101111 111001010010010 111101111101111 111101111001111"
)
"""The ten digits, each in five rows of three pixels."""


@functools.cache
def text_of(name: str, held_out: bool, folder: Path) -> Tensor:
    """Loads a text as bytes [N]: ``docstrings`` of modules, or ``source`` code of packages.

    Args:
        name: which.
        held_out: the part for evaluation, otherwise that for training.
        folder: keeps it for other processes.
    """
    path = folder / f"{name}-{'held-out' if held_out else 'train'}.npy"
    if not path.exists():
        texts = list(_docstrings() if name == "docstrings" else _source())
        kept = [t for i, t in enumerate(texts) if (i % HELD_OUT == 0) == held_out]
        part = path.with_suffix(f".{os.getpid()}.npy")
        np.save(part, np.frombuffer("\n\n".join(kept).encode(), np.uint8))
        part.replace(path)
    return torch.from_numpy(np.load(path))


def rows_of(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Draws rows from random places of a text: [rows, length]."""
    starts = torch.randint(0, len(text) - length, (rows, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def digits(count: int, generator: torch.Generator) -> Tensor:
    """Draws noisy pictures of digits at six places: [count, pixels and then the digit].

    White is 256, and the noise's standard deviation a quarter of that.
    """
    glyphs = torch.tensor([[*map(int, g)] for g in GLYPHS.split()]).view(10, 5, 3).float()
    labels = torch.randint(0, 10, (count,), generator=generator)
    down = torch.randint(0, 2, (count, 1, 1), generator=generator) + torch.arange(5).view(1, 5, 1)
    right = torch.randint(0, 3, (count, 1, 1), generator=generator) + torch.arange(3).view(1, 1, 3)
    pictures = 0.25 * torch.randn(count, SIDE, SIDE, generator=generator)
    pictures[torch.arange(count).view(-1, 1, 1), down, right] += glyphs[labels]
    return torch.cat([(256 * pictures.flatten(1)).round().long(), labels[:, None]], dim=1)


def _docstrings() -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted(_stdlib().glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
        yield "\n\n".join(filter(None, found))


def _source() -> Iterator[str]:
    for package in PACKAGES:
        for path in sorted((_stdlib() / package).rglob("*.py")):
            yield path.read_text(encoding="utf-8")


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
