"""What the project's own rules share: settings, pages, and the words of a finding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.settings import Text, check_fields, list_as_tuple
from ulysses_monitor.records import Alert, Severity, StepRecord
from ulysses_monitor.records.command import RERUN, parse_words
from ulysses_monitor.rules.history import HISTORY, History

__all__ = ["BuiltinRule", "Entry", "Steps", "Words", "entry", "name_some", "worst_parameters"]

Steps = Annotated[int, Field(ge=1, le=HISTORY - 1)]
"""A number of earlier steps, as many as the history can hold."""

_Count = Annotated[int, Field(ge=0, le=1_000_000)]


def _one_as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else list_as_tuple(value)


Words = Annotated[tuple[Text, ...], BeforeValidator(_one_as_tuple)]
"""Texts; one text, or a list as YAML has it, becomes a tuple."""

_PAGES: dict[str, Entry] = {}


@dataclass(frozen=True, kw_only=True)
class BuiltinRule:
    """Base of the rules that come with the project: checked settings, and what all rules have.

    Raises:
        InputError: a setting is wrong.
    """

    name: Text
    severity: Severity = "warning"
    """``info``, ``warning`` or ``critical``."""
    warmup: _Count = 0
    """Steps that must have been seen before the first alert."""
    patience: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Steps in a row at which the condition must hold; only steps that have the metrics count."""
    cooldown: _Count = 0
    """Steps from one alert about a metric to the next."""
    clear: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Steps in a row without the condition that end an alert."""
    on_alert: Words = ()
    """What the training then does, in words of ``ulysses control``: save, stop, policy.NAME=active,
    lr_factor=0.5; or ``rerun``, which computes the step again at once."""
    topic: str = ""
    """The page in docs/rules whose causes and advice an alert gives; empty: that of `name`."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Metrics of which the rule reads columns, if no setting names them."""
    tables: ClassVar[tuple[str, ...]] = ()
    """Patterns of metrics of which the rule reads all values."""
    alternatives: ClassVar[bool] = False
    """Whether one of `needs` is enough."""

    def __post_init__(self) -> None:
        check_fields(f"rule {self.name}", self)
        if self.on_alert:
            try:
                if others := [word for word in self.on_alert if word != RERUN]:
                    parse_words(others)
            except InputError as error:
                raise InputError(f"rule {self.name}: on_alert: {error}") from None

    @property
    def columns(self) -> tuple[str, ...]:
        """Metrics of which the rule reads columns."""
        return self.reads

    @property
    def needs(self) -> tuple[str, ...]:
        """Names and patterns of the metrics that the rule reads."""
        return (*self.columns, *self.tables)

    @property
    def triggers(self) -> tuple[str, ...]:
        """Which of them a record must have for the rule to be asked; one is enough."""
        return self.needs

    @property
    def values_needed(self) -> int:
        """Values of `triggers` that there must be before the condition can hold."""
        return 1

    @property
    def steps_needed(self) -> int:
        """Steps that the run must have before the condition can hold."""
        return 1

    @property
    def lasts(self) -> int:
        """Newest values that the condition is about: it began so many values ago."""
        return 1

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        """See `Rule.check`; timing and `on_alert` are left to `RuleSet`."""
        if isinstance(history, History):
            return self.look(history)
        return self.look(History.of(history, self.columns, self.tables))

    def look(self, history: History) -> list[Alert]:
        """Returns alerts if the condition holds for the newest record."""
        raise NotImplementedError

    def alert(
        self,
        history: History,
        metric: str,
        value: float,
        threshold: float,
        text: str,
        *,
        where: str = "",
        severity: Severity | None = None,
    ) -> Alert:
        """Returns an alert about the newest record.

        Args:
            history: its newest record is meant.
            metric: the metric.
            value: its value.
            threshold: what the value crossed.
            text: what is wrong, with numbers, as the end of ``Step 7: ...``.
            where: the layers, modules or parameters concerned.
            severity: if it differs from the rule's.
        """
        step = history[-1].step
        page = _PAGES.get(self.topic or self.name)
        return Alert(
            rule=self.name,
            step=step,
            metric=metric,
            value=float(value),
            threshold=float(threshold),
            message=f"Step {step}: {text}.",
            hint=page.advice if page else "",
            severity=severity or self.severity,
            where=where,
            causes=page.causes if page else (),
            page=f"docs/rules/{page.name}.md" if page else "",
            command=self.on_alert,
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A rule as the project ships it: how it is made, and what its page says.

    Attributes:
        name: its name, which is also that of its page.
        family: what it is about, such as ``numbers``.
        make: makes the rule; takes settings.
        sees: what it finds, in one or two sentences.
        formula: its condition.
        source: where the condition or its threshold comes from.
        causes: likely causes, the most likely first.
        advice: what to try.
    """

    name: str
    family: str
    make: Callable[..., BuiltinRule]
    sees: str
    formula: str
    source: str
    causes: tuple[str, ...]
    advice: str


def entry(
    name: str,
    kind: Callable[..., BuiltinRule],
    /,
    *,
    family: str,
    sees: str,
    formula: str,
    causes: Sequence[str],
    advice: str,
    source: str = "this project, tuned on benchmarks/faults",
    **settings: Any,
) -> Entry:
    """Declares a rule; `settings` are what it has beside the defaults of its kind."""
    made = Entry(
        name=name,
        family=family,
        make=partial(kind, **{"name": name, "topic": name, **settings}),
        sees=sees,
        formula=formula,
        source=source,
        causes=tuple(causes),
        advice=advice,
    )
    _PAGES[name] = made
    return made


def name_some(names: Iterable[str], most: int = 3) -> str:
    """Names the first of some things, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def worst_parameters(record: StepRecord, prefix: str, most: int = 3) -> str:
    """Names the parameters with the largest values under `prefix`, at most `most` of them."""
    found = [(record[n], n.removeprefix(prefix)) for n in record.schema.match(f"{prefix}*")]
    found = sorted((pair for pair in found if pair[0]), reverse=True)
    return name_some((name for _, name in found), most)
