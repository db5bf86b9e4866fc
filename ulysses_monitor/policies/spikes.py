"""What to do about spikes: leave the step out, lower the rate, go back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ulysses_monitor.errors import InputError
from ulysses_monitor.policies.base import OwnPolicy, check_value
from ulysses_monitor.policies.bounds import Bounded
from ulysses_monitor.records import Action, StepRecord

__all__ = ["SkipOutliers", "SpikeEscalation"]

_LOSS, _NORM = "train/loss/total", "grad/norm/total"


@dataclass(kw_only=True)
class SkipOutliers(Bounded):
    """Leaves out a step whose loss or gradient norm is far above those before it.

    Source: OLMo-core's SkipStep optimizers: above mean + 6 standard deviations of the last 128
    steps, from the 64th on. All values enter the window, those of skipped steps too, so that a
    level that stays becomes the usual one; `longest` bounds the steps in a row.
    """

    acts: ClassVar[frozenset[str]] = frozenset({"skip"})

    sigmas: float = 6.0
    """Standard deviations above the mean."""
    window: int = 128
    """Steps that the newest is held against."""
    warmup: int = 64
    """Steps that must have passed."""
    metrics: tuple[str, ...] = (_LOSS, _NORM)
    """Of which any counts."""
    longest: int = 10
    """See `Bounded`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_window(self.name or "skip_outliers", self)
        self.metrics = tuple(self.metrics)

    @property
    def reads(self) -> tuple[str, ...]:
        """See `OwnPolicy.reads`."""
        return self.metrics

    @property
    def silent_steps(self) -> int:
        """See `OwnPolicy.silent_steps`."""
        return super().silent_steps + self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record, seen = history[-1], self.memory.setdefault("seen", {})
        outliers = []
        for metric in self.metrics:
            value, past = record.get(metric), seen.setdefault(metric, [])
            limit = _limit(past, self)
            if limit is not None and value > limit:
                outliers.append((metric, value, limit))
            past.append(value)
            del past[: -self.window]
        if self.acts_now(bool(outliers), bool(outliers)):
            metric, value, limit = outliers[0]
            yield Action(
                kind="skip",
                reason=f"{metric} is {value:.4g}, above {limit:.4g}",
                read={metric: value for metric, value, _ in outliers},
            )


@dataclass(kw_only=True)
class SpikeEscalation(OwnPolicy):
    """Answers spikes with as much as they need: skip, then a lower rate, then going back.

    - A step whose loss or norm is above mean + `sigmas` standard deviations of the last sound
      steps is left out, `longest` in a row at most.
    - `patience` such steps within `window` steps lower the rate to `lowered`, for `hold` steps
      after the last of them; then it rises again, by doubling.
    - Where the smoothed loss has given back `setback` of all that it had gained, weights and
      optimizer state go back to a snapshot that is at least `steps_back` steps old, the next
      `skip_steps` batches train nothing, and the rate is lowered, too. This is done `most` times
      at most, with `cooldown` steps in between.

    A snapshot is asked for every `snapshot_every` steps, while the run is calm.

    Source: the first answer is OLMo-core's SkipStep; the last is that of PaLM (arXiv:2204.02311,
    section 5.1: go back about 100 steps, leave out 200 to 500 batches), where a person did it. The
    defaults suit fine-tuning, which is shorter.
    """

    acts: ClassVar[frozenset[str]] = frozenset({"skip", "lr_factor", "roll_back", "snapshot"})

    sigmas: float = 6.0
    """Standard deviations above the mean that make a spike."""
    window: int = 128
    """Sound steps that the newest is held against."""
    warmup: int = 20
    """Sound steps that must have passed."""
    longest: int = 5
    """Steps in a row that are left out; what stays longer is no spike but a new level."""
    patience: int = 3
    """Spikes within `window` steps that lower the rate."""
    lowered: float = 0.5
    """On the rate, each time."""
    floor: float = 0.0625
    """Below which the rate is not lowered."""
    hold: int = 100
    """Steps that a lowered rate stays."""
    setback: float = 0.25
    """Share of what the loss had gained that must be lost for going back."""
    gained: float = 0.05
    """Share of its first value that the loss must have gained before that counts."""
    smoothing: float = 0.9
    """Of the moving average of the loss."""
    snapshot_every: int = 25
    """Steps from one snapshot to the next; 0 takes none, and never goes back."""
    steps_back: int = 10
    """Age of the snapshot that is gone back to."""
    skip_steps: int = 5
    """Batches that train nothing after going back."""
    most: int = 3
    """Times that it goes back."""
    cooldown: int = 50
    """Steps after going back in which it is not done again."""

    def __post_init__(self) -> None:
        what = self.name or "spike_escalation"
        _check_window(what, self)
        for name in ("longest", "patience"):
            check_value(what, name, getattr(self, name), 1, 10_000, whole=True)
        for name in ("hold", "snapshot_every", "steps_back", "skip_steps", "most", "cooldown"):
            check_value(what, name, getattr(self, name), 0, 1_000_000, whole=True)
        for name in ("lowered", "floor", "setback", "gained", "smoothing"):
            check_value(what, name, getattr(self, name), 0, 1)

    @property
    def reads(self) -> tuple[str, ...]:
        """See `OwnPolicy.reads`."""
        return (_LOSS, _NORM)

    @property
    def silent_steps(self) -> int:
        """See `OwnPolicy.silent_steps`; of spikes, snapshots come before."""
        return self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        loss, norm = record.get(_LOSS), record.get(_NORM)
        m = self._memory(loss)
        spike = self._spike(m, {_LOSS: loss, _NORM: norm})
        m["since"] += 1
        if spike:
            m["recent"] = [*m["recent"], record.step]
        m["recent"] = [step for step in m["recent"] if step > record.step - self.window]
        lost = self._lost(m, loss, bool(spike))
        back = self._goes_back(m, lost)
        self._set_rate(m, record.step, bool(spike), back)
        if m["factor"] < 1.0:
            yield Action(
                kind="lr_factor",
                values={"factor": m["factor"]},
                reason=f"lowered until step {m['until']}",
            )
        if back:
            yield self._back(loss, lost)
        elif spike and m["row"] <= self.longest:
            metric, value, limit = spike
            reason = f"{metric} is {value:.4g}, above {limit:.4g}"
            yield Action(kind="skip", reason=reason, read={metric: value})
        elif self._may_snapshot(m, record.step, bool(spike)):
            m["snapshot"] = record.step
            yield Action(kind="snapshot", reason="the run is calm")

    def _memory(self, loss: float) -> dict[str, Any]:
        if not self.memory:
            self.memory = {
                "sound": {_LOSS: [], _NORM: []},
                "row": 0,  # spikes in a row
                "recent": [],  # steps of spikes
                "factor": 1.0,
                "until": 0,  # step until which the rate is lowered
                "first": loss,
                "smooth": loss,
                "best": loss,
                "backs": 0,
                "since": self.cooldown,  # steps since the last going back
                "snapshot": 0,
            }
        return self.memory

    def _spike(self, m: dict[str, Any], now: dict[str, float]) -> tuple[str, float, float] | None:
        """The first metric that is far out, with its value and limit; sound steps are noted."""
        found = None
        for metric, value in now.items():
            limit = _limit(m["sound"][metric], self)
            if limit is not None and value > limit and found is None:
                found = metric, value, limit
        m["row"] = m["row"] + 1 if found else 0
        # What lasts longer than a spike may is a new level, to be learnt.
        if found is None or m["row"] > self.longest:
            for metric, value in now.items():
                m["sound"][metric] = [*m["sound"][metric], value][-self.window :]
        return found

    def _lost(self, m: dict[str, Any], loss: float, spike: bool) -> float:
        """Share of what was gained that the smoothed loss has lost; steps left out do not count."""
        if not (spike and m["row"] <= self.longest):
            m["smooth"] += (1 - self.smoothing) * (loss - m["smooth"])
        m["best"] = min(m["best"], m["smooth"])
        gain = m["first"] - m["best"]
        return (
            float((m["smooth"] - m["best"]) / gain) if gain > self.gained * abs(m["first"]) else 0.0
        )

    def _goes_back(self, m: dict[str, Any], lost: float) -> bool:
        due = lost > self.setback and m["since"] > self.cooldown and m["backs"] < self.most
        if not (due and self.snapshot_every and m["snapshot"]):
            return False
        m |= {"backs": m["backs"] + 1, "since": 0, "row": 0, "smooth": m["best"]}
        return True

    def _set_rate(self, m: dict[str, Any], step: int, spike: bool, back: bool) -> None:
        often = spike and len(m["recent"]) >= self.patience
        if back or often:
            m["factor"] = max(self.floor, m["factor"] * self.lowered)
            m |= {"until": step + self.hold, "recent": []}
        elif m["factor"] < 1.0 and step >= m["until"]:
            m["factor"] = min(1.0, m["factor"] / self.lowered)
            m["until"] = step + self.hold

    def _may_snapshot(self, m: dict[str, Any], step: int, spike: bool) -> bool:
        due = self.snapshot_every and step - m["snapshot"] >= self.snapshot_every
        # Weights that are being spoilt are not worth keeping.
        gave = (m["smooth"] - m["best"]) > 0.5 * self.setback * max(m["first"] - m["best"], 0.0)
        return bool(due) and not spike and not (gave and m["snapshot"])

    def _back(self, loss: float, lost: float) -> Action:
        return Action(
            kind="roll_back",
            values={"steps_back": self.steps_back, "skip_steps": self.skip_steps},
            reason=f"the smoothed loss has given back {lost:.0%} of what it had gained",
            read={_LOSS: loss},
        )


def _check_window(what: str, policy: SkipOutliers | SpikeEscalation) -> None:
    check_value(what, "sigmas", policy.sigmas, 0, 1e6)
    check_value(what, "window", policy.window, 2, 100_000, whole=True)
    check_value(what, "warmup", policy.warmup, 2, 100_000, whole=True)
    if policy.warmup > policy.window:
        raise InputError(
            f"policy {what}: can never act: it waits for {policy.warmup} steps and looks at "
            f"{policy.window}; allowed is a warmup of up to window"
        )


def _limit(past: list[float], policy: SkipOutliers | SpikeEscalation) -> float | None:
    """Mean + standard deviations of `past`; None where there are too few."""
    if len(past) < policy.warmup:
        return None
    values = np.asarray(past)
    return float(values.mean() + policy.sigmas * values.std(ddof=1))
