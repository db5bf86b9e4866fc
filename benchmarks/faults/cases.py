"""Which trainings there are, in two halves: thresholds were set on the first half alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.faults import of_data, of_optimizers, of_weights
from benchmarks.faults.registry import FAULTS
from benchmarks.faults.rl import RL_FAULTS, RLTraining
from benchmarks.faults.training import Recorded, Setting, Training

__all__ = ["HALVES", "Case", "faulty", "healthy"]

_BY_MODULE = (of_optimizers, of_weights, of_data)
_FAULTS = [f for m in _BY_MODULE for f in FAULTS.values() if f.breaks.__module__ == m.__name__]
"""In an order of their own, since the place of a fault chooses its kind of training."""

HALVES = ("first", "second")

_SIZES: dict[str, tuple[Setting, Setting]] = {
    "adamw": (
        Setting(name="adamw", rate=3e-3, seed=0),
        Setting(name="adamw", rate=1e-3, width=48, layers=4, batch=12, length=16, seed=10),
    ),
    "sgd": (
        Setting(name="sgd", optimizer="sgd", rate=0.1, seed=1),
        Setting(name="sgd", optimizer="sgd", rate=0.05, width=48, layers=4, accumulate=2, seed=11),
    ),
    "lora": (
        Setting(name="lora", lora=4, rate=5e-3, seed=2),
        Setting(name="lora", lora=8, rate=2e-3, width=48, layers=4, length=16, seed=12),
    ),
    "dpo": (
        Setting(name="dpo", stage="dpo", rate=3e-4, seed=3),
        Setting(name="dpo", stage="dpo", rate=1e-4, width=48, layers=4, batch=12, seed=13),
    ),
}

_RL = (
    Setting(name="grpo", rate=1e-3, layers=2, steps=80, seed=4),
    Setting(name="grpo", rate=5e-4, layers=3, width=48, steps=80, seed=14),
)


@dataclass(frozen=True)
class Case:
    """A training to be judged.

    Attributes:
        fault: name of the fault; empty if it is healthy.
        kind: kind of the training.
        half: 0 for the sizes that thresholds were set on, 1 for the others.
        run: trains.
        onset: first step that the fault shows at.
        names: rules that name the cause.
    """

    fault: str
    kind: str
    half: int
    run: Callable[[], Recorded]
    onset: int = 0
    names: Sequence[str] = ()


def faulty(half: int) -> Iterator[Case]:
    """Yields a case for each fault, in another kind of training in each half."""
    for i, fault in enumerate(_FAULTS):
        kind = fault.fits[(i + half) % len(fault.fits)]
        training = Training(_SIZES[kind][half])
        if kind == "dpo":
            training.logs = lambda _, t: t.numbers
        fault.breaks(training)
        yield Case(fault.name, kind, half, training.run, fault.onset, fault.names)
    for rl in RL_FAULTS.values():
        answers = RLTraining(_RL[half])
        rl.breaks(answers)
        yield Case(rl.name, "grpo", half, answers.run, rl.onset, rl.names)


def healthy(half: int) -> Iterator[Case]:
    """Yields healthy trainings of many sizes, rates and seeds, 20 and 4 of RL for each half."""
    for kind, sizes in _SIZES.items():
        for i, factor in enumerate((1.0, 0.3, 0.1, 0.5, 1.5)):
            base = sizes[half]
            setting = replace(
                base,
                rate=base.rate * factor,
                seed=100 * (half + 1) + 10 * i + base.seed,
                batch=base.batch * (1 + i % 2),
                clip=(1.0, 0.3, 0.0)[i % 3] if kind != "sgd" else 1.0,
                steps=120 + 40 * (i % 3),
                layers=base.layers + i % 2,
            )
            training = Training(setting)
            if kind == "dpo":
                training.logs = lambda _, t: t.numbers
            yield Case("", kind, half, training.run)
    for i in range(4):
        base = _RL[half]
        rl = replace(base, seed=base.seed + 100 * (i + 1), rate=base.rate * (1.0, 0.5, 0.3, 1.5)[i])
        yield Case("", "grpo", half, RLTraining(rl).run)
