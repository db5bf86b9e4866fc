"""Judges what was counted: what is wrong with a data set, and how bad it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ulysses_core.data.config import DataConfig
from ulysses_core.data.health.counting import SPLITS, RowCounter
from ulysses_core.data.health.duplicates import Duplicates
from ulysses_core.data.health.findings import EXAMPLES, Finding, Severity, Spots
from ulysses_core.data.health.texts import list_special_ids
from ulysses_core.data.sources import RowPlan
from ulysses_monitor.common.formatting import share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHECKS", "Judge"]

_SPECIAL, _DOMINANT, _COVERAGE = 0.05, 0.30, 0.05
_MANY, _SOME = 0.05, 0.01
"""Shares of rows from which damage is serious, and from which it is a warning."""
_ONE_SIDED, _LENGTH_RATIO = 0.1, 2.0
_ORDER: Mapping[Severity, int] = {"serious": 0, "warning": 1, "note": 2}

CHECKS: Mapping[str, str] = {
    "unreadable_rows": "rows that the stage cannot read",
    "no_labels": "rows without a token to train on",
    "label_coverage": "share of tokens that are trained on",
    "special_tokens": "share of special tokens",
    "dominant_token": "one token that is most of what is trained on",
    "repetitive_rows": "rows that repeat one token",
    "truncated": "rows cut at cutoff_len",
    "cut_answers": "answers cut at cutoff_len",
    "exact_duplicates": "rows that are equal",
    "near_duplicates": "rows that are nearly equal",
    "train_eval_overlap": "rows to evaluate on that are trained on",
    "bos_doubled": "two tokens that begin a text, one behind the other",
    "eos_missing": "answers without a token that ends them",
    "role_markers": "marks of a template within texts",
    "identical_sides": "pairs whose answers are equal",
    "empty_sides": "pairs with an empty answer",
    "side_lengths": "lengths of chosen and rejected answers",
    "kto_balance": "desirable and undesirable answers",
    "secrets": "keys, tokens and credentials",
    "possible_secrets": "values behind names such as password",
    "addresses": "e-mail addresses",
}
"""Every check, and what it is about."""


class Judge:
    """Judges what a counter counted.

    Args:
        config: the data settings.
        plan: the stage's.
        tokenizer: the model's.
        counter: its index must be finished.
    """

    def __init__(
        self,
        config: DataConfig,
        plan: RowPlan,
        tokenizer: PreTrainedTokenizerBase,
        counter: RowCounter,
    ) -> None:
        self._config, self._plan, self._tokenizer = config, plan, tokenizer
        self._counter = counter
        numbers = [counter.numbers(split) for split in SPLITS]
        self._train = numbers[0] if config.dataset else numbers[1]
        self._all = sum(each.examples + each.unreadable for each in numbers)

    def findings(self) -> list[Finding]:
        """Returns what is wrong, the serious ones first."""
        return sorted(self._found, key=lambda finding: _ORDER[finding.severity])

    def clean(self) -> list[str]:
        """Returns the checks that found nothing."""
        found = {finding.check for finding in self._found} | set(self.skipped())
        return [name for name in CHECKS if name not in found]

    def skipped(self) -> dict[str, str]:
        """Returns the checks that do not apply, and why."""
        kind, stage = self._plan.kind, self._plan.name
        reasons: dict[str, str] = {}
        if kind != "pairs":
            not_pairs = f"stage {stage} has no preference pairs"
            reasons |= dict.fromkeys(("identical_sides", "empty_sides", "side_lengths"), not_pairs)
        if kind != "tagged":
            reasons["kto_balance"] = f"stage {stage} has no kto_tag"
        if kind == "prompts":
            of_answers = ("label_coverage", "dominant_token", "cut_answers", "eos_missing")
            reasons |= dict.fromkeys(of_answers, f"stage {stage} samples its answers")
        if not self._config.eval_dataset or not self._config.dataset:
            held_out = f"val_size is {self._config.val_size:g}: see the duplicates"
            missing = "dataset and eval_dataset are not both set"
            reasons["train_eval_overlap"] = held_out if self._config.val_size else missing
        if self._counter.tokens.sum() == 0:
            of_tokens = ("special_tokens", "dominant_token", "label_coverage")
            reasons |= dict.fromkeys(of_tokens, "there are no rows to train on")
        return reasons

    @cached_property
    def _found(self) -> list[Finding]:
        skipped = self.skipped()
        judged = (*self._judge_rows(), *self._judge_tokens(), *self._judge_copies())
        return [each for each in judged if each.check not in skipped] + [
            each for each in self._judge_preferences() if each.check not in skipped
        ]

    # -- rows by what is wrong with them ---------------------------------------------------------

    def _judge_rows(self) -> Iterator[Finding]:
        refuses = self._config.bad_rows == "refuse"
        stops = " With bad_rows: refuse, the training stops there." if refuses else ""
        always: Severity = "serious" if refuses else "warning"
        cutoff = f"cutoff_len {self._config.cutoff_len:,}"
        yield from self._rows("unreadable_rows", f"cannot be read.{stops}", _MEND, always)
        yield from self._rows("no_labels", f"have nothing to train on.{stops}", _RAISE, always)
        yield from self._rows("identical_sides", f"have two equal answers.{stops}", _MEND, always)
        yield from self._rows("empty_sides", f"have an empty answer.{stops}", _MEND, always)
        yield from self._rows("cut_answers", f"have an answer that is cut at {cutoff}", _RAISE)
        yield from self._rows("truncated", f"have a prompt that is cut at {cutoff}", _RAISE)
        yield from self._rows("bos_doubled", "begin twice: the template and the text do", _BOS)
        yield from self._rows(
            "eos_missing", "have an answer without a token that ends it", _EOS, of=self._answers
        )
        yield from self._rows("role_markers", "have marks of a template in their text", _MARKS)
        yield from self._rows("repetitive_rows", "are one token to 30 % or more", _LOOK)
        yield from self._rows("secrets", "hold a key, a token or credentials", _SECRET, "serious")
        yield from self._rows("possible_secrets", "hold what looks like a password", _SECRET)
        yield from self._rows("addresses", "hold an e-mail address", _ADDRESS)

    @property
    def _answers(self) -> int:
        return self._counter.answers

    def _rows(
        self,
        check: str,
        what: str,
        advice: str,
        severity: Severity | None = None,
        *,
        of: int | None = None,
    ) -> Iterator[Finding]:
        """Yields what is wrong with rows; how bad it is follows from their share if not given."""
        spots, whole = self._counter.spots.get(check, Spots()), of or self._all
        if spots.count:
            yield Finding(
                check=check,
                severity=severity or _by_share(spots.count / whole),
                message=f"{_of(spots.count, whole)} rows {what}".rstrip("."),
                advice=advice,
                count=spots.count,
                examples=spots.where,
            )

    # -- tokens ----------------------------------------------------------------------------------

    def _judge_tokens(self) -> Iterator[Finding]:
        tokens, trained = self._counter.tokens, self._counter.trained
        if not tokens.sum():
            return
        special = [i for i in list_special_ids(self._tokenizer) if i < len(tokens)]
        part = float(tokens[special].sum() / tokens.sum())
        if part > _SPECIAL:
            most = max(special, key=lambda i: tokens[i])
            message = (
                f"{share(part)} of all tokens are special tokens, most of them {self._name(most)}"
            )
            yield _about_all("special_tokens", "warning", message, _SPECIAL_ADVICE)
        if trained.sum():
            yield from self._judge_trained(trained, float(trained.sum() / tokens.sum()))

    def _judge_trained(self, trained: npt.NDArray[np.int64], covered: float) -> Iterator[Finding]:
        most = int(trained.argmax())
        part = float(trained[most] / trained.sum())
        if part > _DOMINANT:
            message = f"{share(part)} of the tokens that are trained on are {self._name(most)}"
            yield _about_all("dominant_token", "serious", message, _LOOK)
        if covered < _COVERAGE:
            message = f"{share(covered)} of the tokens are trained on"
            yield _about_all("label_coverage", "warning", message, _COVERAGE_ADVICE)

    def _name(self, token: int) -> str:
        return f"{self._tokenizer.decode([token])!r} ({token})"

    # -- rows that are there more than once --------------------------------------------------------

    def _judge_copies(self) -> Iterator[Finding]:
        index = self._counter.index
        exact = index.find_exact()
        near = index.find_near(exact)
        within = (each.within(index.splits) for each in (exact, near))
        rows, held_out = len(index.splits), int((index.splits == 1).sum())
        for check, pairs in zip(("exact_duplicates", "near_duplicates"), within, strict=True):
            what = "rows repeat another" if check[0] == "e" else "rows are nearly equal to another"
            extra = (
                "; with val_size, some may be both trained and evaluated on"
                if self._config.val_size
                else ""
            )
            severity: Severity = "warning" if len(pairs) > _SOME * rows else "note"
            yield from self._copies(
                check, severity, f"{_of(len(pairs), rows)} {what}{extra}", pairs
            )
        across = [each.across(index.splits) for each in (exact, near)]
        both = Duplicates(*(np.concatenate(p) for p in zip(*map(_pair, across), strict=True)))
        message = f"{_of(len(both), held_out)} rows to evaluate on are trained on as well"
        if len(across[1]):
            message += f", {len(across[1]):,} of them nearly equal"
        yield from self._copies("train_eval_overlap", "serious", message, both, _OVERLAP)

    def _copies(
        self, check: str, severity: Severity, message: str, pairs: Duplicates, advice: str = ""
    ) -> Iterator[Finding]:
        index = self._counter.index
        if len(pairs):
            named = zip(pairs.later[:EXAMPLES], pairs.earlier[:EXAMPLES], strict=True)
            yield Finding(
                check=check,
                severity=severity,
                message=message,
                advice=advice or _COPIES,
                count=len(pairs),
                examples=[f"{index.where(b)}: as {index.where(a)}" for b, a in named],
            )

    # -- preferences -----------------------------------------------------------------------------

    def _judge_preferences(self) -> Iterator[Finding]:
        good, bad = (self._counter.desirable[tag] for tag in (True, False))
        if good + bad:
            part = good / (good + bad)
            message = f"{good:,} answers are desirable and {bad:,} undesirable"
            if not (good and bad):
                yield _about_all("kto_balance", "serious", message, _TAGS)
            elif not _ONE_SIDED <= part <= 1 - _ONE_SIDED:
                yield _about_all("kto_balance", "warning", message, _TAGS)
        sides = self._train.sides
        if sides and min(sides.values()) * _LENGTH_RATIO < max(sides.values()):
            message = "answers have {chosen:.0f} tokens if chosen, {rejected:.0f} if rejected"
            yield _about_all("side_lengths", "warning", message.format(**sides), _LENGTHS)


def _pair(pairs: Duplicates) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return pairs.later, pairs.earlier


def _by_share(part: float) -> Severity:
    return "serious" if part > _MANY else "warning" if part > _SOME else "note"


def _of(count: int, whole: int) -> str:
    return f"{count:,} of {whole:,} ({share(count / max(1, whole))})"


def _about_all(check: str, severity: Severity, message: str, advice: str) -> Finding:
    return Finding(check=check, severity=severity, message=message, advice=advice)


_MEND = "Mend or remove these rows, or set bad_rows: skip."
_RAISE = "Raise cutoff_len, or shorten these rows."
_BOS = "Remove the token from the texts, or use a template without it."
_EOS = "Choose a template that ends answers; without it the model never learns to stop."
_MARKS = "Remove them: the tokenizer reads them as the start of another turn."
_LOOK = "Look at these rows: padding or noise that is trained on?"
_SECRET = "Remove them and revoke the key: a model repeats what it was trained on."  # noqa: S105 - words
_ADDRESS = "Remove or replace them: a model repeats what it was trained on."
_COPIES = "Remove the copies: what is there twice is learnt by heart sooner."
_OVERLAP = "Take them out of one of the two: the evaluation measures memory."
_TAGS = "Check the kto_tag column; balance with kto_chosen_weight and kto_rejected_weight."
_LENGTHS = "The model may learn length alone: compare answers of equal length."
_SPECIAL_ADVICE = "Check the template: short rows, padding in the texts, or tags that are doubled?"
_COVERAGE_ADVICE = "Most of the work is on prompts: shorten them, or set train_on_prompt."
