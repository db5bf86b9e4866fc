"""How long before the loss a divergence is announced: `python -m benchmarks.lead_times`.

Small trainings that diverge slowly, each beside its twin: the same training, batch for batch,
without the cause. The loss shows it at the first step at which the median of eight losses is 5 %
above the twin's. That looks ahead, and knows the twin: no rule could be as early. The early
warnings are the rules of that family, which look at the loss only to see whether it falls.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.faults.divergences import DIVERGENCES, ONSET
from benchmarks.faults.report import share
from benchmarks.faults.training import Recorded, Setting, Training
from benchmarks.tables import spread, table
from ulysses_monitor.records import Alert
from ulysses_monitor.rules import BOOK, RuleSet, make_rules

SIZES = {
    "first": Setting(name="first", rate=3e-3, steps=200, seed=0),
    "second": Setting(
        name="second", rate=1e-3, width=48, layers=4, batch=12, length=16, steps=200, seed=10
    ),
}
"""Thresholds of the early warnings were set on the first."""

HEALTHY = (1.0, 0.3, 0.1, 0.5, 1.5, 1.0, 0.3, 0.6)
"""Rates of further healthy runs, relative to the size's."""

AHEAD, ABOVE = 8, 1.05
LOSS = "train/loss/total"
EARLY = frozenset(name for name, entry in BOOK.items() if entry.family == "early warning")
BY_LOSS = frozenset({"divergence", "loss_spike", "loss_rises", "nonfinite"})


@dataclass(frozen=True)
class Outcome:
    """What was seen of one divergence.

    Attributes:
        size: the training's.
        cause: why it diverges.
        first: the first early warning from the onset on.
        shows: first step at which the loss shows it; None if it does not.
        by_loss: first alert of a rule about the loss, from the onset on.
        false: early warnings before the onset.
    """

    size: str
    cause: str
    first: Alert | None
    shows: int | None
    by_loss: Alert | None
    false: int

    @property
    def lead(self) -> int | None:
        """Steps from the early warning to the loss; negative if it came later."""
        return None if self.first is None or self.shows is None else self.shows - self.first.step


def _train(setting: Setting, cause: str = "") -> Recorded:
    training = Training(setting, probes=["modules"], sample_every=2)
    if cause:
        DIVERGENCES[cause](training)
    return training.run()


def _losses(recorded: Recorded) -> np.ndarray:
    found = {r.step: r.get(LOSS) for r in recorded.records if LOSS in r}
    return np.array([found[step] for step in sorted(found)])


def _shows(losses: np.ndarray, twin: np.ndarray) -> int | None:
    for at in range(ONSET - 1, len(losses) - AHEAD + 1):
        here, there = (np.median(each[at : at + AHEAD]) for each in (losses, twin))
        if not here <= ABOVE * there:  # also NaN
            return at + 1
    return None


def _alerts(recorded: Recorded) -> list[Alert]:
    rule_set = RuleSet(make_rules("default"))
    return [alert for record in recorded.records for alert in rule_set.observe(record)]


def _first(alerts: Sequence[Alert], rules: frozenset[str]) -> Alert | None:
    return next((a for a in alerts if a.rule in rules and a.step >= ONSET), None)


def _outcomes(name: str, setting: Setting, twin: Recorded) -> Iterator[Outcome]:
    usual = _losses(twin)
    for cause in DIVERGENCES:
        recorded = _train(setting, cause)
        alerts = _alerts(recorded)
        false = sum(a.rule in EARLY and a.step < ONSET for a in alerts)
        shows = _shows(_losses(recorded), usual)
        yield Outcome(name, cause, _first(alerts, EARLY), shows, _first(alerts, BY_LOSS), false)
        print(name, cause, flush=True)


def _healthy(name: str, setting: Setting, twin: Recorded) -> Iterator[tuple[str, list[Alert]]]:
    yield name, _alerts(twin)
    for i, factor in enumerate(HEALTHY):
        other = replace(
            setting,
            rate=setting.rate * factor,
            seed=setting.seed + 100 + 10 * i,
            batch=setting.batch * (1 + i % 2),
            layers=setting.layers + i % 2,
            steps=240,
        )
        yield name, _alerts(_train(other))
        print(name, "healthy", i, flush=True)


# -- tables ---------------------------------------------------------------------------------------


def _row(o: Outcome) -> list[str]:
    early = "none" if o.first is None else f"{o.first.rule}, {o.first.step}"
    by_loss = "none" if o.by_loss is None else f"{o.by_loss.rule}, {o.by_loss.step}"
    shows = "not in 200 steps" if o.shows is None else str(o.shows)
    return [o.cause, o.size, early, shows, "-" if o.lead is None else str(o.lead), by_loss]


def _summary(outcomes: Sequence[Outcome], healthy: Sequence[tuple[str, list[Alert]]]) -> str:
    rows = []
    for size in SIZES:
        of_size = [o for o in outcomes if o.size == size]
        shown = [o for o in of_size if o.shows is not None]
        leads = [o.lead for o in shown if o.lead is not None]
        # One that was not announced counts as announced after all others.
        every = sorted([*leads, *[-ONSET] * (len(shown) - len(leads))])
        runs = [alerts for name, alerts in healthy if name == size]
        warned = sum(any(a.rule in EARLY for a in alerts) for alerts in runs)
        before = sum(o.false > 0 for o in of_size)
        rows.append(
            [
                size,
                share(sum(lead > 0 for lead in leads), len(shown)),
                spread(leads, "g") if leads else "-",
                f"{statistics.median(every):g}" if every else "-",
                share(sum(lead >= 15 for lead in leads), len(shown)),
                share(warned, len(runs)),
                str(before),
            ]
        )
    head = ["size", "announced before the loss", "lead in steps, median [least, most]"]
    head += ["median if what was not announced counts", "15 steps before or more"]
    return table([*head, "healthy runs with an early warning", "warned before the onset"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    healthy: list[tuple[str, list[Alert]]] = []
    for name, setting in SIZES.items():
        twin = _train(setting)
        outcomes += _outcomes(name, setting, twin)
        healthy += _healthy(name, setting, twin)
    head = ["cause", "size", "first early warning, step", "the loss shows it at", "lead"]
    text = (
        f"# Lead of early warnings\n\nThe cause begins at step {ONSET}; the module probe reads at "
        "every second step.\n\n"
        + _summary(outcomes, healthy)
        + "\n\n"
        + table([*head, "first rule about the loss, step"], [_row(o) for o in outcomes])
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
