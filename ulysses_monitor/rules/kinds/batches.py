"""Labels that do not fit the tokens, and data that changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ulysses_monitor.common.settings import MetricName
from ulysses_monitor.records import Alert
from ulysses_monitor.rules.builtin import BuiltinRule, Steps
from ulysses_monitor.rules.history import History, median_of

__all__ = ["DataChanged", "EndsNotTrained", "LabelsChanged", "LabelsMisaligned", "LargeShare"]

OWN = "data/label_own/total"
COPIED = "data/label_copied/total"
AHEAD = "data/label_ahead/total"
OVERLAP = "data/token_overlap/total"
ENDS = "data/end_tokens/total"
TRAINED = "data/end_trained/total"

_Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class LabelsMisaligned(BuiltinRule):
    """Finds labels that are a place off: the token that predicts them, or the next but one."""

    above: _Share = 0.9
    """Share of the labels that are off by the same place."""
    reads = (OWN, COPIED, AHEAD)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if not history.last(OWN) < 1 - self.above / 2:
            return []
        copied, ahead = history.last(COPIED), history.last(AHEAD)
        if not max(copied, ahead) > self.above:
            return []
        if copied > ahead:
            metric, value = COPIED, copied
            text = f"{value:.0%} of the labels are the token that they are predicted from"
        else:
            metric, value = AHEAD, ahead
            text = f"{value:.0%} of the labels are the next but one token: they are shifted twice"
        return [self.alert(history, metric, value, self.above, text)]


@dataclass(frozen=True, kw_only=True)
class LabelsChanged(BuiltinRule):
    """Finds labels that were the rows' own tokens and no longer are."""

    had: _Share = 0.98
    """Share of the labels that were their own token at the start."""
    below: _Share = 0.9
    """Share that is too small."""
    reads = (OWN,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        value = history.last(OWN)
        if not value < self.below or not history.start(OWN, 4) >= self.had:
            return []
        text = f"{1 - value:.0%} of the labels are not the tokens of their row, as they were before"
        return [self.alert(history, OWN, value, self.below, text)]


@dataclass(frozen=True, kw_only=True)
class DataChanged(BuiltinRule):
    """Finds trained tokens whose frequencies have become others, from one step to the next."""

    sigmas: Annotated[float, Field(gt=0)] = 6.0
    """Robust standard deviations, of a median of `recent` values, that the overlap has fallen."""
    least: _Share = 0.02
    """The overlap has fallen by this share at least."""
    recent: Annotated[int, Field(ge=2, le=32)] = 4
    """Newest values, all of which are below the lowest usual one."""
    window: Steps = 48
    """Number of values that say what is usual."""
    reads = (OVERLAP,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        usual = history.baseline(OVERLAP, self.window, self.recent)
        value = history.last(OVERLAP)
        if usual.size < 16 or not value < (1 - self.least) * usual.median:
            return []
        level = median_of(history.samples(OVERLAP)[-self.recent :])
        limit = usual.median * min(1 - self.least, 1 - self.sigmas * usual.spread)
        if not level < limit:
            return []
        text = (
            f"the trained tokens are others than before: their frequencies overlap by {level:.3g} "
            f"with those of the steps before, usually {usual.median:.3g}"
        )
        return [self.alert(history, OVERLAP, level, limit, text)]


@dataclass(frozen=True, kw_only=True)
class LargeShare(BuiltinRule):
    """Finds a share that is large on the mean of many steps, however it is in each of them."""

    metric: MetricName
    """The share."""
    above: _Share
    """A mean above this is wrong."""
    window: Steps = 32
    """Number of values; where there are fewer, the others count as 0."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `BuiltinRule`."""
        return (self.metric,)

    @property
    def lasts(self) -> int:
        """See `BuiltinRule`."""
        return self.window

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if not history.last(self.metric) > 0:
            return []
        recent = history.samples(self.metric)[-self.window :]
        if not float(recent.sum()) > self.above * self.window:
            return []
        mean = float(recent.mean())
        text = f"{self.metric} was {mean:.3g} on the mean of its last {len(recent)} values"
        return [self.alert(history, self.metric, mean, self.above, text)]


@dataclass(frozen=True, kw_only=True)
class EndsNotTrained(BuiltinRule):
    """Finds end tokens of which not one was trained, at any step."""

    least: Annotated[int, Field(ge=1)] = 8
    """End tokens that there must have been: a few may all be those of prompts."""
    reads = (TRAINED, ENDS)

    @property
    def triggers(self) -> tuple[str, ...]:
        """See `BuiltinRule.triggers`."""
        return (TRAINED,)

    def look(self, history: History) -> list[Alert]:
        """See `BuiltinRule.look`."""
        if history.last(TRAINED) != 0 or history.highest(TRAINED) > 0:
            return []
        count = float(history.samples(ENDS).sum())
        if count < self.least:
            return []
        text = f"none of the {count:.0f} end tokens so far has a label, so none is learnt"
        return [self.alert(history, TRAINED, 0.0, 0.0, text)]
