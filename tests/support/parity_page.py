"""The table in docs/parity.md, and the errors that it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tests.support.parity_cases import ENGINES, KINDS, ParityCase

__all__ = ["BOUNDS", "PAGE", "SIZES", "Errors", "all_cases", "measure", "read_page", "write_page"]

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
SIZES = (2, 3, 4)

_INTRO = """\
# Every stage on several ranks against one process

Each row is a training of two SGD steps by a stage's own code, with 12 query and 3 key/value heads,
its rows split over 2, 3 or 4 ranks (gloo, CPU). The same training on one process is the truth. A
cell has the worst errors, rounded up to a power of ten:

- **loss**: the first loss, relative (allowed: 1e-9)
- **gradients**: of the first step, for each parameter relative to its norm (allowed: 1e-6)
- **weights**: after two steps, for each parameter relative to its norm (allowed: 1e-6)
- **metrics**: every number that the trainer logs, absolute or relative (allowed: 1e-6)

All is computed in float64, also what models and TRL compute in float32, so that an error of the
method cannot hide behind rounding. Where a cell has 1e-8 to 1e-6, a library rounds to float32: TRL
in the backward pass of its chunked output layer, DeepSpeed in ZeRO-3's shards. 1e-12 stands for
anything smaller. Rows named `packed` have several documents. Accelerate gives Trainers FSDP2 on
GPUs only, so torch's `fully_shard` is applied here by hand. In `grpo` and `ppo` the first step
samples answers, and both steps train on them; tokens, rewards and the sampler's log-probabilities,
which are float32, are the same on all ranks.

TRL's own ORPO and CPO trainers are compared in the same way, with every loss, by
`tests/core/parallel/test_pair_trainers.py`.

`make test-full` trains all rows and writes this table; `make test` trains some of them.

"""
_HEAD = ("stage", "engine", "adapters", *(f"{n} ranks" for n in SIZES))


@dataclass(frozen=True)
class Errors:
    """The worst errors of a training."""

    loss: float
    gradients: float
    weights: float
    metrics: float

    def __str__(self) -> str:
        return " / ".join(_round_up(error) for error in astuple(self))


BOUNDS = Errors(loss=1e-9, gradients=1e-6, weights=1e-6, metrics=1e-6)


def _round_up(error: float) -> str:
    if not math.isfinite(error):
        return str(error)
    return f"1e{max(-12, math.ceil(math.log10(max(error, 1e-12))))}"


def all_cases() -> list[ParityCase]:
    """Returns every case of the table."""
    return [
        ParityCase(kind=kind, engine=engine, adapters=adapters, size=size)
        for kind in KINDS
        for engine in ENGINES
        for adapters in (True, False)
        for size in SIZES
    ]


def measure(truth: Mapping[str, Any], found: Mapping[str, Any]) -> Errors:
    """Compares a training with the same on one process."""
    numbers = [
        abs(one[key] - other[key]) / max(1.0, abs(one[key]))
        for one, other in zip(truth["logged"], found["logged"], strict=True)
        for key in one.keys() | other.keys()
    ]
    loss = truth["losses"][0]
    return Errors(
        loss=abs(found["losses"][0] - loss) / abs(loss),
        gradients=_worst(truth["gradients"], found["gradients"]),
        weights=_worst(truth["weights"], found["weights"]),
        metrics=max(numbers),
    )


def _worst(truth: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Returns the largest error relative to a tensor's norm, or to a millionth of the whole."""
    assert truth.keys() == found.keys()
    least = 1e-6 * math.sqrt(sum(float(t.norm()) ** 2 for t in truth.values()))
    return max(float((found[n] - t).norm()) / max(float(t.norm()), least) for n, t in truth.items())


def write_page(errors: Mapping[str, Errors]) -> None:
    """Writes the table of all cases; `errors` has them by label."""
    lines = [_HEAD, ("---",) * len(_HEAD)]
    for case in all_cases()[:: len(SIZES)]:
        start = (case.kind, case.engine, "LoRA" if case.adapters else "full")
        cells = [str(errors[case.label[:-1] + str(size)]) for size in SIZES]
        lines.append((*start, *cells))
    legend = "Cells: loss / gradients / weights / metrics.\n\n"
    PAGE.write_text(_INTRO + legend + "".join(f"| {' | '.join(line)} |\n" for line in lines))


def read_page() -> dict[str, list[float]]:
    """Returns the errors in the table, by the case's label."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines()
            if line.startswith("| ")][2:]  # fmt: skip
    return {
        f"{kind}-{engine}-{adapters.lower()}-{size}": [float(e) for e in cell.split(" / ")]
        for kind, engine, adapters, *cells in rows
        for size, cell in zip(SIZES, cells, strict=True)
    }
