"""An answer to spikes that escalates: skip the step, lower the rate, roll back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from ulysses_monitor.policies.base import LOSS, NORM, BuiltinPolicy, Share
from ulysses_monitor.policies.outliers import (
    WindowLength,
    outlier_limit,
    remember,
    window_problem,
)
from ulysses_monitor.records import Action, StepRecord

__all__ = ["SpikeEscalation"]

Sigmas = Annotated[float, Field(gt=0, le=1_000_000)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


@dataclass(kw_only=True)
class SpikeEscalation(BuiltinPolicy):
    """Answers a spike with as much as it needs: skip it, then lower the rate, then roll back.

    - It skips a step whose norm is above mean + `sigmas` standard deviations of the last sound
      steps and whose loss is above mean + `loss_sigmas`, at most `longest` in a row. A norm alone
      is not enough: norms have heavy tails, on healthy runs of small batches they are now and then
      ten times their mean, and clipping answers those.
    - `patience` such steps within `window` steps multiply the rate by `lowered`, for `hold` steps
      after the last of them. Then the rate is divided by `lowered` again, once every `hold` steps:
      with 0.5 it halves and doubles.
    - When the smoothed loss has given back the share `setback` of all that it had gained, and more
      than `certainty` standard deviations of its noise, weights and optimizer state roll back to a
      snapshot that is at least `steps_back` steps old, the next `skip_steps` batches train nothing,
      and the rate is lowered as well. This happens at most `most` times, with `cooldown` steps in
      between.

    The policy asks for a snapshot every `snapshot_every` steps while the run is calm and may still
    roll back. Two snapshots are kept.

    Source: the first answer is OLMo-core's SkipStep; the last is that of PaLM (arXiv:2204.02311,
    section 5.1: go back about 100 steps, leave out 200 to 500 batches), where a person did it. The
    defaults suit fine-tuning, which is shorter.
    """

    action_kinds: ClassVar[frozenset[str]] = frozenset(
        {"skip", "lr_factor", "roll_back", "snapshot"}
    )

    sigmas: Sigmas = 6.0
    """Standard deviations of the norm above its mean that make a spike."""
    loss_sigmas: Sigmas = 3.0
    """Standard deviations of the loss above its mean that a spike needs as well."""
    window: WindowLength = 128
    """Number of sound steps that the newest is compared with."""
    warmup: WindowLength = 20
    """Sound steps that must have passed before any step is a spike."""
    longest: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Most consecutive steps that are skipped; what lasts longer is a new level, not a spike."""
    patience: Annotated[int, Field(ge=1, le=10_000)] = 3
    """Spikes within `window` steps that lower the rate."""
    lowered: Share = 0.5
    """Factor on the rate, each time."""
    floor: Share = 0.0625
    """Smallest factor that the rate is lowered to."""
    hold: Count = 100
    """Steps for which a lowered rate stays."""
    setback: Share = 0.25
    """Share of the loss's gain that must be lost before the policy rolls back."""
    certainty: Sigmas = 6.0
    """Standard deviations of the smoothed loss that the loss must have risen by."""
    gained: Share = 0.05
    """Share of the first loss that counts as gained, at least."""
    smoothing: Share = 0.95
    """Decay of the loss's moving average."""
    snapshot_every: Count = 25
    """Steps from one snapshot to the next; with 0 there are none, and no rolling back."""
    steps_back: Count = 10
    """Least age of the snapshot that the policy rolls back to, in steps."""
    skip_steps: Count = 5
    """Batches that train nothing after rolling back."""
    most: Count = 3
    """Most times that the policy rolls back."""
    cooldown: Count = 50
    """Steps after rolling back before the policy does so again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if problem := window_problem(self.warmup, self.window):
            raise self._refusal(problem)
        if self.patience > self.window:
            raise self._refusal(
                f"patience is {self.patience}; expected at most window, which is {self.window}"
            )
        if self.snapshot_every and self.steps_back > self.snapshot_every:
            raise self._refusal(
                f"steps_back is {self.steps_back}; expected at most snapshot_every, which is "
                f"{self.snapshot_every}: the older of two snapshots may be no older than that"
            )

    @property
    def needed_metrics(self) -> tuple[str, ...]:
        """See `BuiltinPolicy.needed_metrics`."""
        return (LOSS, NORM)

    @property
    def steps_before_acting(self) -> int:
        """See `BuiltinPolicy.steps_before_acting`; snapshots may come earlier."""
        return self.warmup

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        """See `Policy.decide`."""
        record = history[-1]
        loss, norm = record.get(LOSS), record.get(NORM)
        m = self._memory()
        spike = self._is_spike(m, {LOSS: loss, NORM: norm})
        calm = m["row"] == 0
        m["since"] += 1
        if spike:
            m["recent"].append(record.step)
        m["recent"] = [step for step in m["recent"] if step > record.step - self.window]
        lost = self._share_lost(m, loss, spike)
        rolls_back = self._should_roll_back(m, lost)
        self._set_rate(m, record.step, spike, rolls_back)
        if m["factor"] < 1.0:
            yield Action(
                kind="lr_factor",
                values={"factor": m["factor"]},
                reason=f"rate lowered until step {m['until']}",
            )
        if rolls_back:
            yield self._roll_back(loss, lost)
        elif spike:
            reason = "gradient norm and loss are far above those of sound steps"
            yield Action(kind="skip", reason=reason, read={NORM: norm, LOSS: loss})
        elif calm and self._needs_snapshot(m, record.step):
            m["snapshot"] = record.step
            yield Action(kind="snapshot", reason="the run is calm")

    def _memory(self) -> dict[str, Any]:
        if not self.memory:
            self.memory = {
                "sound": {LOSS: [], NORM: []},
                "row": 0,  # consecutive steps that are far out
                "recent": [],  # steps of spikes
                "factor": 1.0,
                "until": 0,  # last step of this factor
                "first": None,  # first loss that is known
                "smooth": 0.0,
                "best": 0.0,
                "backs": 0,
                "since": self.cooldown,  # steps since the last roll-back
                "snapshot": 0,
            }
        return self.memory

    def _is_spike(self, m: dict[str, Any], now: dict[str, float]) -> bool:
        """Tells whether norm and loss are far out; remembers the values of sound steps.

        What lasts longer than `longest` is not a spike but a new level, and is remembered.
        """
        sigmas = {NORM: self.sigmas, LOSS: self.loss_sigmas}
        limits = {n: outlier_limit(m["sound"][n], self.warmup, sigmas[n]) for n in now}
        far_out = all((limit := limits[n]) is not None and now[n] > limit for n in now)
        m["row"] = m["row"] + 1 if far_out else 0
        if far_out and m["row"] <= self.longest:
            return True
        for metric, value in now.items():
            remember(m["sound"][metric], value, self.window)
        return False

    def _share_lost(self, m: dict[str, Any], loss: float, spike: bool) -> float:
        """Returns the share of its gain that the smoothed loss has lost; spikes do not count.

        Returns 0 where chance may explain the loss's rise. The differences between steps give the
        loss's own noise, whatever its trend; an exponential average leaves (1 - s) / (1 + s) of its
        variance.
        """
        if math.isfinite(loss) and not spike:
            if m["first"] is None:
                m |= {"first": loss, "smooth": loss, "best": loss}
            m["smooth"] += (1 - self.smoothing) * (loss - m["smooth"])
            m["best"] = min(m["best"], m["smooth"])
        first = m["first"] or 0.0
        gain = first - m["best"]
        noise = float(np.std(np.diff(m["sound"][LOSS]))) if len(m["sound"][LOSS]) > 2 else 0.0
        noise *= math.sqrt(0.5 * (1 - self.smoothing) / (1 + self.smoothing))
        rise = m["smooth"] - m["best"]
        least = self.gained * abs(first)
        if rise <= self.certainty * noise or not least:
            return 0.0
        return float(rise / max(gain, least))

    def _should_roll_back(self, m: dict[str, Any], lost: float) -> bool:
        due = lost > self.setback and m["since"] > self.cooldown and m["backs"] < self.most
        if not (due and self.snapshot_every and m["snapshot"]):
            return False
        m |= {"backs": m["backs"] + 1, "since": 0, "row": 0, "smooth": m["best"]}
        return True

    def _set_rate(self, m: dict[str, Any], step: int, spike: bool, rolls_back: bool) -> None:
        often = spike and len(m["recent"]) >= self.patience
        if rolls_back or often:
            m["factor"] = max(self.floor, m["factor"] * self.lowered)
            m |= {"until": step + self.hold, "recent": []}
        elif m["factor"] < 1.0 and step > m["until"]:
            m["factor"] = min(1.0, m["factor"] / self.lowered)
            m["until"] = step - 1 + self.hold

    def _needs_snapshot(self, m: dict[str, Any], step: int) -> bool:
        if not self.snapshot_every or m["backs"] >= self.most:
            return False  # the run will not roll back any more
        # A snapshot of weights that are being spoilt is not worth keeping.
        gained = max((m["first"] or 0.0) - m["best"], 0.0)
        gave = m["smooth"] - m["best"] > 0.5 * self.setback * gained
        return step - m["snapshot"] >= self.snapshot_every and not (gave and m["snapshot"])

    def _roll_back(self, loss: float, lost: float) -> Action:
        return Action(
            kind="roll_back",
            values={"steps_back": self.steps_back, "skip_steps": self.skip_steps},
            reason=f"the smoothed loss has given back {lost:.0%} of what it had gained",
            read={LOSS: loss},
        )
