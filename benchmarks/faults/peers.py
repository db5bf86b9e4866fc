"""Other tools' detectors, with their defaults, on the same numbers; those that are installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping

from benchmarks.faults.training import Recorded
from ulysses_monitor.records import Alert

__all__ = ["installed_peers"]

Judge = Callable[[Recorded], list[Alert]]


def installed_peers() -> dict[str, Judge]:
    """Returns what judges a training as another tool does, for each tool that is installed.

    TrainCheck is not among them: it checks traces of instrumented scripts, not numbers.
    """
    known = {"trainscope": ("trainscope 1.8", _trainscope), "rlwatch": ("rlwatch 0.5", _rlwatch)}
    return {
        f"{title}, its defaults": judge
        for package, (title, judge) in known.items()
        if importlib.util.find_spec(package) is not None
    }


def _trainscope(recorded: Recorded) -> list[Alert]:
    """Its CUSUM of the loss, and a loss that is not finite."""
    from trainscope.core.config import TrainScopeConfig
    from trainscope.core.detectors import make_detector

    detector = make_detector(TrainScopeConfig())
    found = []
    for step, numbers in _steps(recorded):
        loss = numbers.get("train/loss/total")
        if loss is None:
            continue
        score = detector.update(loss) if math.isfinite(loss) else math.inf
        if score is not None:
            found.append(_alert("trainscope", step, "warning", score))
    return found


_RLWATCH: Mapping[str, tuple[str, ...]] = {
    "entropy": ("train/entropy/total",),
    "kl_divergence": ("train/kl/total",),
    "reward_mean": ("train/reward/total",),
    "reward_std": ("train/reward_std/total",),
    "loss": ("train/loss/total",),
    "grad_norm": ("grad/norm/total",),
}


def _rlwatch(recorded: Recorded) -> list[Alert]:
    """Its seven detectors, of which losses and norms are all that is there outside of RL."""
    from rlwatch.config import RLWatchConfig
    from rlwatch.detectors import DetectorSuite

    suite = DetectorSuite(RLWatchConfig())
    found = []
    for step, numbers in _steps(recorded):
        given = {
            word: numbers[name]
            for word, names in _RLWATCH.items()
            for name in names
            if name in numbers
        }
        alerts = suite.check_step(step, **given)
        found += [_alert(alert.detector, step, alert.severity, 0.0) for alert in alerts]
    return found


def _steps(recorded: Recorded) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields the numbers of each whole step."""
    steps: dict[int, dict[str, float]] = {}
    for record in recorded.records:
        steps.setdefault(record.step, {}).update(record.to_dict())
    yield from steps.items()


def _alert(rule: str, step: int, severity: str, value: float) -> Alert:
    kind = "critical" if severity == "critical" else "warning"
    return Alert(
        rule=rule, step=step, metric="", value=value, threshold=0.0, message=rule, severity=kind
    )
