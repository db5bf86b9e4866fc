"""Which trainings there are, in two halves: thresholds were set on the first half alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.faults import (
    of_data,
    of_optimizers,
    of_schedules,
    of_weights,
    reported_losses,
    reported_ranks,
    reported_trainers,
)
from benchmarks.faults.healthy import HEALTHY_RANKS, HEALTHY_TRAINERS
from benchmarks.faults.of_ranks import RANK_FAULTS
from benchmarks.faults.pair import the_pair
from benchmarks.faults.ranks import RankTraining
from benchmarks.faults.registry import FAULTS
from benchmarks.faults.reported import REPORTED, SIZES
from benchmarks.faults.rl import RL_FAULTS, RLTraining
from benchmarks.faults.training import Recorded, Setting, Training

__all__ = ["GROUPS", "HALVES", "SEEDS", "Case", "every_case", "faulty", "healthy"]

_BY_MODULE = (of_optimizers, of_weights, of_data, of_schedules)
_FAULTS = [f for m in _BY_MODULE for f in FAULTS.values() if f.breaks.__module__ == m.__name__]
"""In an order of their own, since the place of a fault chooses its kind of training."""

_REPORTED_IN = {m.__name__ for m in (reported_trainers, reported_losses, reported_ranks)}

HALVES = ("first", "second")
SEEDS = 3
GROUPS = ("faults", "two processes", "reported bugs")

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

_RANKS = (
    Setting(name="ddp", rate=3e-3, steps=70, seed=5),
    Setting(name="ddp", optimizer="sgd", rate=0.05, width=48, layers=4, steps=70, seed=15),
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
        group: one of `GROUPS`.
        seed: which of `SEEDS`.
    """

    fault: str
    kind: str
    half: int
    run: Callable[[], Recorded]
    onset: int = 0
    names: tuple[str, ...] = ()
    group: str = GROUPS[0]
    seed: int = 0

    def without_training(self) -> Case:
        """Returns what can be sent to another process."""
        return replace(self, run=_no_run)


def _no_run() -> Recorded:
    raise NotImplementedError("this case came back from a process without what trains it")


def _seeded(setting: Setting, seed: int) -> Setting:
    return replace(setting, seed=setting.seed + 1000 * seed)


def every_case(seed: int) -> Iterator[Case]:
    """Yields all trainings with a seed, both halves."""
    for half in (0, 1):
        yield from healthy(half, seed)
        yield from faulty(half, seed)
    for half in (0, 1):
        yield from _healthy_trainers(half, seed)
        yield from _of_ranks(half, seed)
        yield from _reported(half, seed)


def faulty(half: int, seed: int = 0) -> Iterator[Case]:
    """Yields a case for each fault, in another kind of training in each half."""
    for i, fault in enumerate(_FAULTS):
        kind = fault.fits[(i + half) % len(fault.fits)]
        training = Training(_seeded(_SIZES[kind][half], seed))
        if kind == "dpo":
            training.logs = lambda _, t: t.numbers
        fault.breaks(training)
        yield Case(fault.name, kind, half, training.run, fault.onset, fault.names, seed=seed)
    for rl in RL_FAULTS.values():
        answers = RLTraining(_seeded(_RL[half], seed))
        rl.breaks(answers)
        yield Case(rl.name, "grpo", half, answers.run, rl.onset, rl.names, seed=seed)


def healthy(half: int, seed: int = 0) -> Iterator[Case]:
    """Yields healthy trainings of many sizes, rates and seeds, 20 and 4 of RL for each half."""
    for kind, sizes in _SIZES.items():
        for i, factor in enumerate((1.0, 0.3, 0.1, 0.5, 1.5)):
            base = sizes[half]
            setting = replace(
                base,
                rate=base.rate * factor,
                seed=100 * (half + 1) + 10 * i + base.seed + 1000 * seed,
                batch=base.batch * (1 + i % 2),
                clip=(1.0, 0.3, 0.0)[i % 3] if kind != "sgd" else 1.0,
                steps=120 + 40 * (i % 3),
                layers=base.layers + i % 2,
            )
            training = Training(setting)
            if kind == "dpo":
                training.logs = lambda _, t: t.numbers
            yield Case("", kind, half, training.run, seed=seed)
    for i in range(4):
        base = _seeded(_RL[half], seed)
        rl = replace(base, seed=base.seed + 100 * (i + 1), rate=base.rate * (1.0, 0.5, 0.3, 1.5)[i])
        yield Case("", "grpo", half, RLTraining(rl).run, seed=seed)


# -- Trainers and ranks ----------------------------------------------------------------------------


def _reported(half: int, seed: int) -> Iterator[Case]:
    setting = _seeded(SIZES[half], seed)
    for bug in REPORTED.values():
        run = (
            _on_ranks("reported", bug.name, setting) if bug.ranks > 1 else partial(bug.run, setting)
        )
        kind = f"{bug.ranks} ranks" if bug.ranks > 1 else "Trainer"
        yield Case(bug.name, kind, half, run, bug.onset, bug.names, GROUPS[2], seed)


def _healthy_trainers(half: int, seed: int) -> Iterator[Case]:
    for name, make in HEALTHY_TRAINERS.items():
        run = make(_seeded(SIZES[half], seed + 10)).run
        yield Case("", f"Trainer, {name}", half, run, group=GROUPS[2], seed=seed)


def _of_ranks(half: int, seed: int) -> Iterator[Case]:
    setting = _seeded(_RANKS[half], seed)
    for name in HEALTHY_RANKS:
        run = _on_ranks("healthy", name, _seeded(setting, 10))
        yield Case("", f"2 ranks, {name}", half, run, group=GROUPS[1], seed=seed)
    for fault in RANK_FAULTS.values():
        run = _on_ranks("fault", fault.name, setting)
        names = fault.names
        yield Case(fault.name, setting.name, half, run, fault.onset, names, GROUPS[1], seed)


def _on_ranks(what: str, name: str, setting: Setting) -> Callable[[], Recorded]:
    return lambda: the_pair().run(_train_on_rank, what, name, setting)


def _train_on_rank(what: str, name: str, setting: Setting) -> Recorded:
    """Trains on one of two ranks."""
    if what == "reported":
        return REPORTED[name].run(setting)
    training = RankTraining(setting)
    if what == "healthy":
        HEALTHY_RANKS[name](training)
    else:
        RANK_FAULTS[name].breaks(training)
    return training.run()
