"""Warm-up, patience, cool-down and clearing are the set's; what could not be checked is said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.rules import BOOK, RuleSet, make_rules
from ulysses_monitor.rules.builtin import BuiltinRule

X = "a/x/total"


def steps_of_alerts(values: Sequence[float], **timing: Any) -> list[int]:
    """Returns the steps at which a rule ``x > 1`` with `timing` raises an alert."""
    (rule,) = make_rules([{f"{X} > 1": timing}])
    rule_set = RuleSet([rule])
    records = [
        StepRecord.of(i, 0.0, {"b/b/b": 0.0} if math.isnan(x) else {X: x})
        for i, x in enumerate(values, 1)
    ]
    return [alert.step for record in records for alert in rule_set.observe(record)]


UP, DOWN, NONE = 2.0, 0.0, math.nan


@pytest.mark.parametrize(
    ("values", "timing", "expected"),
    [
        ([UP] * 9, {}, [1]),
        ([UP] * 9, {"warmup": 4}, [5]),
        ([UP] * 9, {"patience": 3}, [3]),
        ([UP, UP, DOWN, UP, UP, UP], {"patience": 3}, [6]),
        ([UP, NONE, NONE, UP, NONE, UP], {"patience": 3}, [6]),  # a sampled metric
        ([UP, DOWN, UP, DOWN, UP], {}, [1, 3, 5]),
        ([UP, DOWN, UP, DOWN, DOWN, UP], {"clear": 2}, [1, 6]),
        ([UP, NONE, NONE, UP], {"clear": 2}, [1]),
        ([UP, DOWN, UP, DOWN, UP, DOWN, UP], {"cooldown": 4}, [1, 5]),
        ([UP, DOWN] + [UP] * 6, {"cooldown": 4}, [1, 5]),
        ([UP] * 9, {"warmup": 2, "patience": 5}, [5]),
    ],
)
def test_a_condition_becomes_an_alert_when_its_timing_says(
    values: list[float], timing: dict[str, int], expected: list[int]
) -> None:
    assert steps_of_alerts(values, **timing) == expected


def test_an_alert_says_since_when() -> None:
    (rule,) = make_rules([{f"{X} > 1 for 3": {}}])
    rule_set = RuleSet([rule])
    records = [StepRecord.of(i, 0.0, {X: 2.0}) for i in range(7, 12)]
    (alert,) = [alert for record in records for alert in rule_set.observe(record)]
    assert (alert.step, alert.since) == (9, 7)
    assert alert.message.endswith("It began at step 7.")
    assert alert.to_event(0.0).data["since"] == 7


def test_a_second_record_of_a_step_is_not_a_second_step() -> None:
    (rule,) = make_rules([f"{X} > 1 and a/y/total > 1 for 2"])
    rule_set = RuleSet([rule])
    found = []
    for step in (1, 2, 3):
        for values in ({X: 2.0}, {"a/y/total": 2.0}):
            found += rule_set.observe(StepRecord.of(step, 0.0, values))
    assert [alert.step for alert in found] == [2]


def test_a_number_that_is_logged_twice_counts_as_the_later() -> None:
    rule_set = RuleSet(make_rules([f"{X} > 1"]))
    assert rule_set.observe(StepRecord.of(1, 0.0, {X: 0.0, "b/b/b": 1.0})) == []
    assert len(rule_set.observe(StepRecord.of(1, 0.0, {X: 2.0}))) == 1


def test_a_rule_of_the_users_may_have_timing_and_needs_as_attributes() -> None:
    class Mine:
        name, patience, needs = "mine", 2, (X,)
        asked = 0

        def check(self, history: Sequence[StepRecord]) -> list[Alert]:
            Mine.asked += 1
            assert [record.step for record in history[-2:]] == [r.step for r in list(history)[-2:]]
            return [
                Alert(
                    rule="mine", step=history[-1].step, metric=X, value=1, threshold=0, message="m."
                )
            ]

    rule_set = RuleSet([Mine()])
    records = [StepRecord.of(i, 0.0, {X if i % 2 else "b/b/b": 1.0}) for i in range(1, 8)]
    found = [alert.step for record in records for alert in rule_set.observe(record)]
    assert (found, Mine.asked) == ([3], 4)


def test_rules_that_could_not_be_checked_are_named_with_the_reason() -> None:
    rule_set = RuleSet(make_rules(["default", "grad/norm/total > 1", "my/metrc/total > 1"]))
    for step in range(1, 6):
        values = {"train/loss/total": 2.0, "grad/norm/total": 1.0, "my/metric/total": 1.0}
        rule_set.observe(StepRecord.of(step, 0.0, values))
    reasons = rule_set.unchecked()
    assert "nonfinite" not in reasons
    assert "grad_norm" not in reasons
    assert "(did you mean 'my/metric/total'?)" in reasons["my_metrc"]
    assert reasons["lora_idle"].endswith(
        "the model has no LoRA adapters, or they could not be read"
    )
    assert reasons["kl_runaway"].startswith("train/kl/total or train/objective/kl/total is not rec")
    assert reasons["overfitting"].endswith("the training does not evaluate")
    assert reasons["loss_spike"] == "the run has 5 steps; the rule waits for 33"


def test_every_rule_says_what_it_needs() -> None:
    for entry in BOOK.values():
        rule = entry.make()
        assert rule.needs, entry.name
        assert set(rule.triggers) <= {*rule.columns, *rule.tables}, entry.name


def test_a_rule_with_too_few_values_is_not_checked() -> None:
    rule_set = RuleSet(make_rules(["plateau", "does_not_move", "not_learning", "nonfinite"]))
    for step in range(1, 61):
        values = {"train/loss/total": 2.0, "grad/norm/param/a": 1.0}
        sampled = {"optim/update_ratio/param/a": 0.1, "optim/update_ratio/total": 0.1}
        rule_set.observe(StepRecord.of(step, 0.0, values | (sampled if step % 30 == 0 else {})))
        rule_set.observe(StepRecord.of(step, 0.0, {"my/metric/total": 1.0}))  # the same step
    assert rule_set.unchecked() == {
        "plateau": "train/loss/total has 60 values; the rule needs 200",
        "does_not_move": "optim/update_ratio/param/* has 2 values; the rule needs 3",
        "not_learning": "the run has 60 steps; the rule waits for 100",
    }


def test_a_rule_of_the_book_never_fires_with_fewer_values_than_it_needs() -> None:
    """Alternating numbers that are far apart raise whatever can be raised by one metric."""
    for name in BOOK:
        (rule,) = make_rules([{name: {"warmup": 0, "patience": 1}}])
        assert isinstance(rule, BuiltinRule)
        if any("*" in need for need in rule.needs):
            continue
        for high, low in ((1e6, 1e-6), (1e-6, 1e6), (0.0, 0.0), (2.0, 2.0)):
            rule_set = RuleSet([rule])
            for step in range(1, max(rule.values_needed, rule.steps_needed)):
                value = high if step % 7 == 6 else low * (1 + step / 100)
                found = rule_set.observe(StepRecord.of(step, 0.0, dict.fromkeys(rule.needs, value)))
                assert not found, (name, step, found)
