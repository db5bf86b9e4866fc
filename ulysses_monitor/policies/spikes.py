"""What to do about spikes: leave the step out, lower the rate, go back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies.base import BuiltinPolicy, check_metric, check_value, checked_texts
from ulysses_monitor.policies.bounds import BoundedPolicy
from ulysses_monitor.records import Action, StepRecord

__all__ = ["SkipOutliers", "SpikeEscalation"]

_LOSS, _NORM = "train/loss/total", "grad/norm/total"


@dataclass(kw_only=True)
class SkipOutliers(BoundedPolicy):
    """Leaves out a step whose loss or gradient norm is far above those before it.

    Source: OLMo-core's SkipStep optimizers: above mean + 6 standard deviations of the last 128
    steps, once there are 64; it counts the step in question among both, here they are those before
    it. All values enter the window, those of skipped steps too, so that a level that stays becomes
    the usual one; `longest` bounds the steps in a row. A value that is not known or not finite does
    not enter.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset({"skip"})

    sigmas: float = 6.0
    """Standard deviations above the mean."""
    window: int = 128
    """Steps that the newest is held against."""
    warmup: int = 64
    """Steps that must have passed."""
    metrics: tuple[str, ...] = (_LOSS, _NORM)
    """Of which any counts."""
    longest: int = 10
    """See `BoundedPolicy`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = self.name or "skip_outliers"
        _check_window(what, self)
        self.metrics = checked_texts(what, "metrics", self.metrics, _NORM)
        for metric in self.metrics:
            check_metric(what, "metrics", metric)

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return self.metrics

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`."""
        return super().steps_before_acting + self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record, seen = history[-1], self.memory.setdefault("seen", {})
        outliers = []
        for metric in self.metrics:
            value, past = record.get(metric), seen.setdefault(metric, [])
            limit = _limit(past, self.warmup, self.sigmas)
            if limit is not None and value > limit:
                outliers.append((metric, value, limit))
            _note(past, value, self.window)
        if self.should_act(bool(outliers), bool(outliers)):
            metric, value, limit = outliers[0]
            yield Action(
                kind="skip",
                reason=f"{metric} is {value:.4g}, above {limit:.4g}",
                read={metric: value for metric, value, _ in outliers},
            )


@dataclass(kw_only=True)
class SpikeEscalation(BuiltinPolicy):
    """Answers spikes with as much as they need: skip, then a lower rate, then going back.

    - A step whose norm is above mean + `sigmas` standard deviations of the last sound steps, and
      its loss above mean + `loss_sigmas`, is left out, `longest` in a row at most. Norms alone
      have heavy tails: on healthy runs of small batches they are ten times their mean now and
      then, and clipping is answer enough.
    - `patience` such steps within `window` steps multiply the rate by `lowered`, for `hold` steps
      after the last of them; then it is divided by it again, once every `hold` steps: with 0.5 it
      halves and doubles.
    - Where the smoothed loss has given back `setback` of all that it had gained, and more than
      `certainty` times what chance makes of it, weights and optimizer state go back to a snapshot
      that is at least `steps_back` steps old, the next `skip_steps` batches train nothing, and the
      rate is lowered, too. This is done `most` times at most, with `cooldown` steps in between.

    A snapshot is asked for every `snapshot_every` steps, while the run is calm and may still go
    back. Two are kept.

    Source: the first answer is OLMo-core's SkipStep; the last is that of PaLM (arXiv:2204.02311,
    section 5.1: go back about 100 steps, leave out 200 to 500 batches), where a person did it. The
    defaults suit fine-tuning, which is shorter.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset(
        {"skip", "lr_factor", "roll_back", "snapshot"}
    )

    sigmas: float = 6.0
    """Standard deviations of the norm above its mean that make a spike."""
    loss_sigmas: float = 3.0
    """Standard deviations of the loss above its mean that it takes, too."""
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
    certainty: float = 6.0
    """Standard deviations of the smoothed loss."""
    gained: float = 0.05
    """Share of its first value that it counts as having gained at least."""
    smoothing: float = 0.95
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
        for name in ("loss_sigmas", "certainty"):
            check_value(what, name, getattr(self, name), 0, 1e6)
        for name in ("lowered", "floor", "setback", "gained", "smoothing"):
            check_value(what, name, getattr(self, name), 0, 1)
        if self.patience > self.window:
            raise InputError(
                f"policy {what}: patience is {self.patience}, of spikes within {self.window} "
                "steps; allowed is up to window"
            )
        if self.snapshot_every and self.steps_back > self.snapshot_every:
            raise InputError(
                f"policy {what}: steps_back is {self.steps_back}, and the older of two snapshots "
                f"may be of {self.snapshot_every} steps ago; allowed is up to snapshot_every"
            )

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (_LOSS, _NORM)

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`; of spikes, snapshots come before."""
        return self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        loss, norm = record.get(_LOSS), record.get(_NORM)
        m = self._memory()
        spike = self._is_spike(m, {_LOSS: loss, _NORM: norm})
        calm = m["row"] == 0
        m["since"] += 1
        if spike:
            m["recent"].append(record.step)
        m["recent"] = [step for step in m["recent"] if step > record.step - self.window]
        lost = self._lost(m, loss, spike)
        back = self._goes_back(m, lost)
        self._set_rate(m, record.step, spike, back)
        if m["factor"] < 1.0:
            yield Action(
                kind="lr_factor",
                values={"factor": m["factor"]},
                reason=f"lowered until step {m['until']}",
            )
        if back:
            yield self._back(loss, lost)
        elif spike:
            reason = "gradient norm and loss are far above those of sound steps"
            yield Action(kind="skip", reason=reason, read={_NORM: norm, _LOSS: loss})
        elif calm and self._may_snapshot(m, record.step):
            m["snapshot"] = record.step
            yield Action(kind="snapshot", reason="the run is calm")

    def _memory(self) -> dict[str, Any]:
        if not self.memory:
            self.memory = {
                "sound": {_LOSS: [], _NORM: []},
                "row": 0,  # steps in a row that are far out
                "recent": [],  # steps of spikes
                "factor": 1.0,
                "until": 0,  # last step of this factor
                "first": None,  # loss, once one is known
                "smooth": 0.0,
                "best": 0.0,
                "backs": 0,
                "since": self.cooldown,  # steps since the last going back
                "snapshot": 0,
            }
        return self.memory

    def _is_spike(self, m: dict[str, Any], now: dict[str, float]) -> bool:
        """Whether norm and loss are far out; sound steps are noted.

        What lasts longer than a spike may is none, but a new level, to be learnt.
        """
        sigmas = {_NORM: self.sigmas, _LOSS: self.loss_sigmas}
        limits = {n: _limit(m["sound"][n], self.warmup, sigmas[n]) for n in now}
        far_out = all((limit := limits[n]) is not None and now[n] > limit for n in now)
        m["row"] = m["row"] + 1 if far_out else 0
        if far_out and m["row"] <= self.longest:
            return True
        for metric, value in now.items():
            _note(m["sound"][metric], value, self.window)
        return False

    def _lost(self, m: dict[str, Any], loss: float, spike: bool) -> float:
        """Share of what was gained that the smoothed loss has lost; steps left out do not count.

        Zero where chance may have made it. Differences of steps tell the loss's own noise, whatever
        its trend; an exponential average leaves (1 - s) / (1 + s) of its variance.
        """
        if math.isfinite(loss) and not spike:
            if m["first"] is None:
                m |= {"first": loss, "smooth": loss, "best": loss}
            m["smooth"] += (1 - self.smoothing) * (loss - m["smooth"])
            m["best"] = min(m["best"], m["smooth"])
        first = m["first"] or 0.0
        gain = first - m["best"]
        noise = float(np.std(np.diff(m["sound"][_LOSS]))) if len(m["sound"][_LOSS]) > 2 else 0.0
        noise *= math.sqrt(0.5 * (1 - self.smoothing) / (1 + self.smoothing))
        rise = m["smooth"] - m["best"]
        least = self.gained * abs(first)
        if rise <= self.certainty * noise or not least:
            return 0.0
        return float(rise / max(gain, least))

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
        elif m["factor"] < 1.0 and step > m["until"]:
            m["factor"] = min(1.0, m["factor"] / self.lowered)
            m["until"] = step - 1 + self.hold

    def _may_snapshot(self, m: dict[str, Any], step: int) -> bool:
        if not self.snapshot_every or m["backs"] >= self.most:
            return False  # nobody would go back to it
        # Weights that are being spoilt are not worth keeping.
        gained = max((m["first"] or 0.0) - m["best"], 0.0)
        gave = m["smooth"] - m["best"] > 0.5 * self.setback * gained
        return step - m["snapshot"] >= self.snapshot_every and not (gave and m["snapshot"])

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


def _note(past: list[float], value: float, window: int) -> None:
    """Adds a value that is finite, and forgets the oldest."""
    if math.isfinite(value):
        past.append(value)
        del past[:-window]


def _limit(past: list[float], warmup: int, sigmas: float) -> float | None:
    """Mean + standard deviations of `past`; None where there are too few."""
    if len(past) < warmup:
        return None
    values = np.asarray(past)
    return float(values.mean() + sigmas * values.std(ddof=1))
