"""Records made by hand or at random, and what policies ask for at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pytest

from ulysses_monitor.policies import Managed, make_policies
from ulysses_monitor.policies.base import MAX_STEPS
from ulysses_monitor.records import Action, StepRecord

MEAN = "grad/abs_mean/tensor_mean"
ALL_MEAN = "grad/abs_mean/total"
NORM = "grad/norm/total"
LOSS = "train/loss/total"
OWN_MEAN = "grad/abs_mean/param/"
OWN_NORM = "grad/norm/param/"
RATIO = "lora/grad_ratio_B_A/"

MODULES = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))
TENSORS = (
    *(f"{module}.lora_{side}.default.weight" for module in MODULES for side in "AB"),
    "model.norm.weight",
    "lm_head.weight",
)
LENGTH = 200
"""Steps of the random trainings."""


class Decides(Protocol):
    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]: ...


def record(step: int, metrics: Mapping[str, float]) -> StepRecord:
    """Makes a record with read-only values: a policy that writes to them raises."""
    made = StepRecord.of(step, 1_700_000_000.0 + step, metrics)
    made.values.setflags(write=False)
    return made


def series(name: str, values: Iterable[float], **others: float) -> list[StepRecord]:
    """Makes a record for each value, from step 1; `others` are constant, with ``__`` for ``/``."""
    more = {key.replace("__", "/"): value for key, value in others.items()}
    return [record(i, {name: value} | more) for i, value in enumerate(values, 1)]


def asked(policy: Decides, records: Iterable[StepRecord]) -> list[list[Action]]:
    """Returns the actions at each record, in order."""
    return [list(policy.decide([each])) for each in records]


def acting_steps(policy: Decides, records: Sequence[StepRecord], kind: str = "") -> list[int]:
    """Returns the steps at which the policy asks for anything, or for actions of one kind."""
    found = zip(records, asked(policy, records), strict=True)
    return [r.step for r, actions in found if any(kind in ("", a.kind) for a in actions)]


def values_of(actions: Iterable[Action]) -> list[tuple[str, dict[str, float]]]:
    return [(action.kind, dict(action.values)) for action in actions]


def near(values: Mapping[str, float]) -> Any:
    """Compares actions to 12 digits."""
    return pytest.approx(dict(values), rel=1e-12, abs=0.0)


def made(spec: Any) -> Managed:
    (policy,) = make_policies([spec])
    return policy


def lively() -> Iterator[StepRecord]:
    """Makes an eventful LoRA training: spikes, small and large gradients, a setback."""
    rng = np.random.default_rng(7)
    for step in range(1, LENGTH + 1):
        size = 1e-2 if step <= 60 else 4e-4 if step <= 100 else 1e-2 if step <= 170 else 20.0
        loss = 2 + 3 * np.exp(-step / 10) + 0.01 * rng.standard_normal()
        loss += 20 * (step in (110, 112, 114)) + 4 * (130 <= step < 150)
        yield record(step, _metrics(step, size, float(loss), rng))


def flat() -> Iterator[StepRecord]:
    """Makes a training whose gradients vanish and whose loss does not move."""
    rng = np.random.default_rng(8)
    for step in range(1, LENGTH + 1):
        weights = {f"param/norm/param/{name}": 1.0 for name in TENSORS if step % 10 == 1}
        loss = 3 + 1e-3 * float(rng.standard_normal())
        yield record(step, _metrics(step, 1e-7, loss, rng) | weights)


def _metrics(step: int, size: float, loss: float, rng: np.random.Generator) -> dict[str, float]:
    means = size * np.exp(0.5 * rng.standard_normal(len(TENSORS)))
    means[: 2 * len(MODULES) : 2] *= 0.005 if 120 < step <= 150 else 1.0  # LoRA's A
    norms = 30 * means * np.exp(0.1 * rng.standard_normal(len(TENSORS)))
    a, b = norms[: 2 * len(MODULES) : 2], norms[1 : 2 * len(MODULES) : 2]
    ratios = [float(ratio) for ratio in b / a]
    return {
        LOSS: loss,
        NORM: float(np.sqrt(np.square(norms).sum())),
        ALL_MEAN: float(means.mean()),
        MEAN: float(means.mean()),
        **{f"{OWN_MEAN}{n}": float(v) for n, v in zip(TENSORS, means, strict=True)},
        **{f"{OWN_NORM}{n}": float(v) for n, v in zip(TENSORS, norms, strict=True)},
        **{f"{RATIO}module/{n}": v for n, v in zip(MODULES, ratios, strict=True)},
        f"{RATIO}total": float(np.median(ratios)),
        "grad/nonfinite/total": 0.0,
        "optim/lr/0": 1e-4,
        MAX_STEPS: float(LENGTH),
    }
