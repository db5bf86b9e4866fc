"""Rules are named in YAML or given as objects; errors come before the training."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.rules import (
    BOOK,
    check_rules,
    default_rules,
    make_rules,
)
from ulysses_monitor.rules.kinds.levels import Vanishing
from ulysses_monitor.rules.kinds.spikes import Spike


class Own:
    """A user's rule."""

    def __init__(self, size: float = 3.0) -> None:
        self.name, self.size = "own", size

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        return []


def own_function(history: Sequence[StepRecord]) -> list[Alert]:
    return [
        Alert(
            rule="own_function",
            step=history[-1].step,
            metric="a/b/total",
            value=1.0,
            threshold=0.0,
            message="seen",
        )
    ]


def names(specs: Any) -> list[str]:
    return [rule.name for rule in make_rules(specs)]


def test_default_is_every_rule_of_the_project() -> None:
    assert names("default") == names("strict") == list(BOOK)
    assert default_rules() == make_rules("default") == make_rules(list(BOOK))


@pytest.mark.parametrize("none", ["off", False, [], ()])
def test_off_and_an_empty_list_make_no_rules(none: Any) -> None:
    check_rules(none)
    assert make_rules(none) == []


def test_names_settings_import_paths_functions_and_objects_all_make_rules() -> None:
    given = Own(7.0)
    first, second, third, fourth, fifth, sixth = make_rules(
        [
            "nonfinite",
            {"loss_spike": {"sigmas": 4}},
            given,
            own_function,
            f"{__name__}:own_function",
            {f"{__name__}:Own": {"size": 5}},
        ]
    )
    assert first.name == "nonfinite"
    assert isinstance(second, Spike)
    assert (second.metric, second.sigmas) == ("train/loss/total", 4.0)
    assert third is given
    assert (fourth.name, fifth.name) == ("own_function", "own_function")
    assert (sixth.name, sixth.size) == ("own", 5)  # type: ignore[attr-defined]


def test_a_function_of_the_history_gives_alerts() -> None:
    (rule,) = make_rules([own_function])
    record = StepRecord.of(7, 0.0, {"a/b/total": 1.0})
    assert [alert.step for alert in rule.check([record])] == [7]


def test_default_can_be_extended_and_duplicate_names_get_numbers() -> None:
    found = names(["default", {"loss_spike": {"sigmas": 4}}])
    assert found == [*BOOK, "loss_spike-2"]
    assert names(["nonfinite", {"loss_spike": {"name": "mine"}}]) == ["nonfinite", "mine"]


def test_objects_keep_their_names() -> None:
    rules = [Spike(metric="a/b/total"), Spike(metric="a/c/total")]
    assert make_rules(rules) == rules
    assert make_rules(iter(rules)) == rules


def test_a_number_that_yaml_reads_as_text_becomes_a_number() -> None:
    read = yaml.safe_load("[{vanishing_gradient: {below: 1e-3}}]")
    assert read[0]["vanishing_gradient"]["below"] == "1e-3"
    (rule,) = make_rules(read)
    assert isinstance(rule, Vanishing)
    assert rule.below == 1e-3


def test_a_file_holds_a_list_under_rules(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules:\n  - nonfinite\n  - gradient_spike: {window: 32, warmup: 16}\n")
    assert names(str(path)) == names(path) == ["nonfinite", "gradient_spike"]
    path.write_text("policies: [zclip]")
    with pytest.raises(InputError, match="holds no list; expected a list, or one under rules"):
        make_rules(path)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("defualt", "rules: 'defualt' is not a rule (did you mean 'default'?); allowed: nonfinite"),
        (["nonfinit"], "(did you mean 'nonfinite'?)"),
        (
            3,
            "got int; expected a list of rules, such as [nonfinite], a preset (default, strict",
        ),
        ([3], "rules: an object of type int is not a rule; expected a function, or an object with"),
        ([Own], "rule Own: is a class; expected an object, Own(...)"),
        ([{"default": {"sigmas": 3}}], "preset default: takes no settings"),
        ([{"loss_spike": {"sigma": 3}}], "unknown setting 'sigma' (did you mean 'sigmas'?)"),
        ([{"loss_spike": {"sigmas": "high"}}], "rule loss_spike: sigmas is 'high'; expected a nu"),
        ([{"loss_spike": {"sigmas": True}}], "rule loss_spike: sigmas is True"),
        ([{"loss_spike": {"window": 0}}], "window is 0; expected an integer from 1 to 255"),
        ([{"loss_spike": {"severity": "high"}}], "severity is 'high'; allowed: info, warning, cr"),
        ([{"loss_spike": {"patience": 0}}], "patience is 0; expected an integer from 1 to"),
        (
            [{"nonfinite": {"on_alert": "explode"}}],
            "rule nonfinite: on_alert: the command has 'exp",
        ),
        (
            [{"rate_out_of_range": {"lora": 1}}],
            "lora is 1; expected the lowest and the highest rate",
        ),
        ([{"loss_spike": {"metric": "grad/*"}}], "expected the name of one metric, such as grad/n"),
        (
            [{"vanishing_gradient": {"below": 0}}],
            "below is 0; expected a number above 0 and at mos",
        ),
        ([{"lora_imbalance": {"high": -1}}], "high is -1; expected a number above 0"),
        ([{"nonfinite": {"name": ""}}], "name is ''; expected text"),
    ],
)
def test_a_wrong_rule_is_refused_in_one_line(specs: Any, message: str) -> None:
    for check in make_rules, check_rules:
        with pytest.raises(InputError) as error:
            check(specs)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_every_setting_of_the_wrong_type_is_refused_by_name() -> None:
    for name in BOOK:
        (rule,) = make_rules([name])
        assert dataclasses.is_dataclass(rule)
        for field in dataclasses.fields(rule):
            with pytest.raises(InputError, match=f"{field.name} is {{}}; (expected|allowed)"):
                make_rules([{name: {field.name: {}}}])


def test_an_expression_is_a_rule_alone_in_a_list_and_with_settings() -> None:
    when = "grad/norm/total > 3 * median(50) for 5"
    (alone,) = make_rules(when)
    listed, named = make_rules([when, {when: {"name": "jumpy", "severity": "critical"}}])
    (spelled_out,) = make_rules([{"expression": {"when": when}}])
    assert alone == listed == spelled_out
    assert (alone.name, alone.patience) == ("grad_norm", 5)  # type: ignore[attr-defined]
    assert (named.name, named.severity) == ("jumpy", "critical")  # type: ignore[attr-defined]
    assert names([when, when]) == ["grad_norm", "grad_norm-2"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train/loss/total > ", "rules: 'train/loss/total >': at 20: unexpected the end; expected"),
        (
            {"a/b/c > 1": {"sevrity": "info"}},
            "unknown setting 'sevrity' (did you mean 'severity'?)",
        ),
        ({"a/b/c > 1 for 3": {"patience": 4}}, "patience is 4; expected what the expression says"),
        ({"expression": {"when": 5}}, "when is 5; expected an expression"),
        ({"expression": {}}, "the setting when is missing"),
    ],
)
def test_a_wrong_expression_is_refused_in_one_line(spec: Any, message: str) -> None:
    for check in make_rules, check_rules:
        with pytest.raises(InputError) as error:
            check([spec])
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_checking_does_not_import_the_users_code() -> None:
    check_rules(["this_is_not_imported.rules:mine", {"antigravity:fly": {"size": 1}}])
    assert "this_is_not_imported" not in sys.modules
    assert "antigravity" not in sys.modules
