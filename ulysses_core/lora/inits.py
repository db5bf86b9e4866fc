"""The names of LoRA's initialisations. Imports no torch: a config is checked with them.

| name | A and B | base |
|---|---|---|
| `default` | A uniform (Kaiming), B 0 | as it is |
| `gaussian` | A normal of std 1 / r, B 0 | as it is |
| `orthogonal` | both orthogonal to one another, so that B A = 0 | as it is |
| `mica` | A 0, B the r smallest left singular vectors, frozen (arXiv 2604.01694) | as it is |
| `eva` | A the main directions of a layer's inputs, B 0 (arXiv 2410.07170) | as it is |
| `pissa`, `pissa_niter_N` | the r largest singular vectors (arXiv 2404.02948) | less B A |
| `olora` | QR decomposition (arXiv 2406.01775) | less B A |
| `corda` | singular vectors, weighted by a layer's inputs (arXiv 2406.05223) | less B A |
| `lora_ga` | singular vectors of the weight's gradient (arXiv 2407.05000) | less B A |
| `orthogonal_small` | A normal of std 0.005, B orthogonal of gain 0.01 | less B A |

`eva`, `corda` and `lora_ga` run the model on rows to train on.
"""

from __future__ import annotations

import re

from ulysses_monitor.common.errors import InputError, nearest

__all__ = [
    "NAMES",
    "changes_base",
    "check_init_name",
    "find_largest_rank",
    "needs_linear",
    "needs_rows",
    "needs_weights",
]

NAMES = (
    "default",
    "gaussian",
    "orthogonal",
    "orthogonal_small",
    "mica",
    "olora",
    "pissa",
    "pissa_niter_N",
    "eva",
    "corda",
    "lora_ga",
)

_REFUSED = {
    "loftq": "PEFT computes it with bitsandbytes and only on CUDA or XPU devices, where this "
    "project has not tried it",
}
"""Initialisations of PEFT that are not served, and why."""

_NITER = re.compile(r"pissa_niter_\d+")


def check_init_name(name: str) -> None:
    """Checks the name of an initialisation.

    Raises:
        InputError: it is unknown, or not served.
    """
    allowed = f"allowed: {', '.join(NAMES)}"
    if name in _REFUSED:
        raise InputError(f"lora_init is {name!r}; {_REFUSED[name]}; {allowed}")
    if name == "pissa_niter_N" or not (name in NAMES or _NITER.fullmatch(name)):
        hint = "" if name == "pissa_niter_N" else nearest(name, NAMES)
        raise InputError(f"lora_init is {name!r}{hint}; {allowed}")


def changes_base(name: str) -> bool:
    """Whether an initialisation takes B A from the base, to start at the base's output."""
    return name in ("olora", "corda", "lora_ga", "orthogonal_small") or name.startswith("pissa")


def needs_weights(name: str) -> bool:
    """Whether an initialisation computes with the base's weights."""
    return changes_base(name) or name in ("mica", "eva")


def needs_rows(name: str) -> bool:
    """Whether an initialisation runs the model on rows to train on."""
    return name in ("eva", "corda", "lora_ga")


def needs_linear(name: str) -> bool:
    """Whether an initialisation knows linear layers only."""
    return needs_weights(name)


def find_largest_rank(name: str, inputs: int, outputs: int) -> tuple[int, str]:
    """Returns the largest rank that an initialisation of a layer gives, and what it is of it."""
    if name == "eva":  # PEFT computes 4 r directions and keeps up to 2 r
        return inputs // 4, "a quarter of the inputs"
    if name == "lora_ga":  # A and B take r singular vectors each
        return min(inputs, outputs) // 2, "half of the smaller side"
    return min(inputs, outputs), "the smaller side"
