"""The names of LoRA's initialisations. Imports no torch: a config is checked with them.

| name | A and B | base |
|---|---|---|
| `default` | A uniform (Kaiming), B 0 | as it is |
| `gaussian` | A normal of std 1 / r, B 0 | as it is |
| `orthogonal` | both orthogonal to one another, so that B A = 0 | as it is |
| `mica` | A 0, B the r smallest left singular vectors, frozen (arXiv 2604.01694) | as it is |
| `pissa`, `pissa_niter_N` | the r largest singular vectors (arXiv 2404.02948) | less B A |
| `olora` | QR decomposition (arXiv 2406.01775) | less B A |
| `orthogonal_small` | A normal of std 0.005, B orthogonal of gain 0.01 | less B A |
"""

from __future__ import annotations

import re

from ulysses_monitor.common.errors import InputError, nearest

__all__ = ["NAMES", "changes_base", "check_init_name", "needs_weights"]

NAMES = (
    "default",
    "gaussian",
    "orthogonal",
    "orthogonal_small",
    "mica",
    "olora",
    "pissa",
    "pissa_niter_N",
)

_REFUSED = {
    "eva": "it runs the model on data before training starts, which the engines here do not",
    "corda": "it runs the model on data before training starts, which the engines here do not",
    "lora_ga": "it needs gradients before training starts, which the engines here do not give",
    "loftq": "it approximates a quantised base, and this one is not; use quantization_bit",
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
    return name in ("olora", "orthogonal_small") or name.startswith("pissa")


def needs_weights(name: str) -> bool:
    """Whether an initialisation computes with the base's weights."""
    return changes_base(name) or name == "mica"
