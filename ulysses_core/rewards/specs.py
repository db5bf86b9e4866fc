"""Rewards by name, as YAML configs take them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from ulysses_core.rewards.builtin import ExactAnswer, Format, LanguageConsistency
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.registry import Named, Registry, distinct_names

__all__ = ["REWARDS", "Reward", "Scorer", "check_rewards", "make_rewards"]


@runtime_checkable
class Reward(Protocol):
    """Scores completions. `score` takes any of the columns that `Scorer` lists, by name."""

    @property
    def score(self) -> Callable[..., Sequence[float | None]]:
        """Returns a number for each completion, or None where it does not apply."""


REWARDS: Mapping[str, type[Reward]] = {
    "exact_answer": ExactAnswer,
    "format": Format,
    "language_consistency": LanguageConsistency,
}
"""The project's own rewards."""


@dataclass(frozen=True)
class _Function:
    """A function of columns as a reward."""

    name: str
    score: Callable[..., Sequence[float | None]]


_REGISTRY: Registry[Reward] = Registry(
    word="reward",
    plural="reward_funcs",
    known=REWARDS,
    protocol=Reward,
    needs="score(completions)",
    wrap=_Function,
    common=("weight",),
    takes_files=False,
)


def make_rewards(specs: Any) -> list[Scorer]:
    """Makes rewards from what a user names them by, and gives each a name of its own.

    Args:
        specs: a list. Each entry is a known name; an import path, ``package.module:name``, of a
            function, a class with a method `score`, or an object with one; a mapping of one of
            these to settings, such as ``{"format": {"weight": 0.2}}``; a function or an object.
            Every reward has the setting `weight` (1). Only classes take others.

    Raises:
        InputError: a name, a setting or an object is wrong, or the list is empty.
    """
    scorers = [_make(spec) for spec, _ in _REGISTRY.expand(specs)]
    if not scorers:
        raise InputError(f"reward_funcs is empty; expected one or more of {', '.join(REWARDS)}")
    names = distinct_names([scorer.name for scorer in scorers])
    return [replace(scorer, name=name) for scorer, name in zip(scorers, names, strict=True)]


def check_rewards(specs: Any) -> None:
    """Checks what `make_rewards` would make, without importing what is the user's.

    Raises:
        InputError: a name, a setting or the form of an import path is wrong.
    """
    for spec, _ in _REGISTRY.expand(specs):
        named = _REGISTRY.parse(spec)
        if named is None or named.name in REWARDS:
            _make(spec)
        else:
            _split(named)


def _make(spec: Any) -> Scorer:
    named = _REGISTRY.parse(spec)
    if named is None:
        reward = _REGISTRY.accept(spec)
        return Scorer(str(getattr(reward, "name", type(reward).__name__)), 1.0, reward)
    weight, own = _split(named)
    return Scorer(named.name.rpartition(":")[2], weight, _REGISTRY.build(own))


def _split(named: Named) -> tuple[float, Named]:
    """Separates the weight, checked, from the reward's own settings."""
    settings = dict(named.settings)
    weight = settings.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"reward {named.name}: weight is {weight!r}; expected a number")
    return float(weight), Named(named.name, settings)


@dataclass(frozen=True)
class Scorer:
    """A reward with its name and weight, which checks what it returns.

    Attributes:
        name: its name in metrics and errors.
        weight: its factor in the sum of rewards.
        reward: what scores.
    """

    name: str
    weight: float
    reward: Reward

    def score(
        self,
        *,
        prompts: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str | None],
        where: Sequence[str],
        **more: Sequence[Any],
    ) -> list[float | None]:
        """Returns the reward of each completion; None where the reward does not apply.

        Args:
            prompts: the last user message of each row.
            completions: the answers to score, without special tokens.
            answers: the reference answers; None for a row without one.
            where: where each row is in its file, for errors.
            more: further columns, such as `completion_ids`.

        Raises:
            InputError: the reward raises, or returns anything but a finite number or None for each
                completion; the message names the reward and the row.
        """
        columns: dict[str, Sequence[Any]] = {
            "prompts": prompts,
            "completions": completions,
            "answers": answers,
            "where": where,
            **more,
        }
        wanted = _select(self.reward.score, columns)
        try:
            rewards = list(self.reward.score(**wanted))
        except Exception as error:  # whatever the user's own code raises
            row = _find_culprit(self.reward.score, wanted, len(completions))
            problem = f"{type(error).__name__}: {error}"
            raise self._fail(where[row], prompts[row], problem) from error
        if len(rewards) != len(completions):
            problem = f"returned {len(rewards)} rewards for {len(completions)} completions"
            raise self._fail(where[0], prompts[0], f"{problem}; expected one for each")
        return [
            self._check(reward, place, prompt)
            for reward, place, prompt in zip(rewards, where, prompts, strict=True)
        ]

    def _check(self, reward: Any, place: str, prompt: str) -> float | None:
        if reward is None:
            return None
        try:
            number = float(reward)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self._fail(
                place, prompt, f"returned {reward!r}; expected a finite number or None"
            )
        return number

    def _fail(self, place: str, prompt: str, problem: str) -> InputError:
        shown = " ".join(prompt.split())
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
        line = " ".join(problem.split())
        return InputError(f"reward {self.name}: {place}, prompt {shown!r}: {line}")


_SHOWN = 80
"""Characters of a prompt that an error shows."""


def _select(function: Callable[..., Any], columns: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that a function takes."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return columns
    return {name: column for name, column in columns.items() if name in parameters}


def _find_culprit(function: Callable[..., Any], columns: dict[str, Any], rows: int) -> int:
    """Returns the first row that fails alone; 0 if none does."""
    for row in range(rows):
        try:
            function(**{name: column[row : row + 1] for name, column in columns.items()})
        except Exception:  # noqa: BLE001 - the one that the caller looks for
            return row
    return 0
