"""Expressions: what they mean, what is unknown, and that no text raises anything but InputError."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import StepRecord
from ulysses_monitor.rules import RuleSet
from ulysses_monitor.rules.expressions import Expression, parse
from ulysses_monitor.rules.expressions.nodes import readings
from ulysses_monitor.rules.history import History

X, Y = "a/x/total", "a/y/total"


def holds(text: str, xs: Sequence[float], ys: Sequence[float] = ()) -> bool | None:
    """Whether an expression holds after the last of `xs`; NaN stands for a missing value."""
    both = [{X: x} for x in xs]
    for record, y in zip(both[len(both) - len(ys) :], ys, strict=True):
        record[Y] = y
    present = [{n: v for n, v in values.items() if not math.isnan(v)} for values in both]
    records = [StepRecord.of(i, 0.0, values) for i, values in enumerate(present, 1)]
    condition = parse(text.replace("X", X).replace("Y", Y)).condition
    return condition.holds(History.of(records, set(readings(condition))))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("X > 4", True),
        ("X > 5", False),
        ("X >= 5 and X <= 5 and X == 5", True),
        ("X != 5 or X < 0", False),
        ("not X < 5", True),
        ("X > 2 * median(4)", False),  # of 1, 2, 3, 4: the newest does not count
        ("X == 2 * median(4)", True),
        ("X == 2 * median(X, 4)", True),
        ("mean(4) == 2.5 and X > 0", None),  # of which metric?
        ("X > mean(4) and X > max(4) and min(4) < X", True),
        ("std(X, 4) > 1.1 and std(X, 4) < 1.2", True),
        ("quantile(X, 0.5, 4) == 2.5 and quantile(X, 1, 4) == 4", True),
        ("X > quantile(0.75, 4)", True),
        ("delta(X, 1) == 1 and delta(X, 4) == 4", True),
        ("ema(X, 4) > 3.09 and ema(X, 4) < 3.1", True),
        ("abs(0 - X) == 5 and sqrt(X + 4) == 3 and log(X) > 1.6", True),
        ("X + 1 - 2 * 3 / 6 == 5", True),
        ("-X == -5", True),
        ("-(X - 1) * 2 == -8", True),
        ("(X > 4 or X < 1) and not (X > 9)", True),
        ("X > 4 or X < 1 and X < 1", True),  # and binds first
    ],
)
def test_an_expression_means_what_it_says(text: str, expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(InputError, match="names no metric"):
            holds(text, [1, 2, 3, 4, 5])
    else:
        assert holds(text, [1, 2, 3, 4, 5]) is expected


@pytest.mark.parametrize(
    ("text", "xs", "expected"),
    [
        ("X > 1", [math.nan], None),
        ("not X > 1", [math.nan], None),
        ("X > 1 or X < 1", [math.nan], None),
        ("X > median(4)", [1, 2, 3, 9], None),  # three values before the newest, not four
        ("X > median(3)", [1, 2, 3, 9], True),
        ("X > median(3)", [1, math.nan, 2, math.nan, 3, 9], True),  # sampled: values, not steps
        ("X / 0 > 1", [1], None),
        ("log(X) < 0 or X < 0", [-1], True),
        ("log(X) < 0", [-1], None),
        ("X > 0 and Y > 0", [1], None),
        ("X > 0 or Y > 0", [1], True),
        ("X < 0 and Y > 0", [1], False),
    ],
)
def test_what_is_not_known_neither_holds_nor_fails(
    text: str, xs: list[float], expected: bool | None
) -> None:
    assert holds(text, xs) is expected


def test_a_window_of_another_metric_and_shorthand_of_the_one_that_is_compared() -> None:
    assert holds("X > 3 * mean(Y, 2)", [0, 0, 4], [1, 1, 9]) is True
    assert holds("Y > 3 * mean(2)", [0, 0, 4], [1, 1, 9]) is True


def test_for_is_the_number_of_steps_in_a_row() -> None:
    rule = Expression(when=f"{X} > 3 * median(5) for 3")
    values = [1.0] * 8 + [9.0, 9.0, 1.0, 9.0, 9.0, 9.0, 9.0]
    rule_set = RuleSet([rule])
    records = [StepRecord.of(i, 0.0, {X: v}) for i, v in enumerate(values, 1)]
    alerts = [a for record in records for a in rule_set.observe(record)]
    # At step 12 the median of the last five is 9.
    assert [a.step for a in alerts] == []
    flat = Expression(when=f"{X} > 3 for 3 steps")
    rule_set = RuleSet([flat])
    alerts = [a for record in records for a in rule_set.observe(record)]
    assert [(a.step, a.since, a.rule, a.value, a.threshold) for a in alerts] == [
        (14, 12, "a_x", 9.0, 3.0)
    ]
    assert (
        f"Step 14: {X} > 3 for 3 steps ({X}: 9 against 3). It began at step 12."
        in alerts[0].message
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at 1: unexpected the end; expected a metric, a number or a function"),
        ("X", "at 1: a number alone; expected a comparison, such as train/loss/total > 5"),
        ("X >", "at 12: unexpected the end"),
        ("X > 1 > 2", "at 15: a second '>'; join two comparisons with and"),
        ("X > meddian(5)", "at 13: unknown word 'meddian' (did you mean 'median'?); allowed: medi"),
        ("X > median(0)", "at 13: median: the window is 0; expected 1 or more"),
        ("X > median(256)", "median: got 256; expected an integer from 1 to 255"),
        ("X > median(2.5)", "median: got 2.5; expected an integer from 1 to 255"),
        ("X > quantile(2, 5)", "quantile: the share is 2; expected 0 to 1"),
        ("X > 5 for 0", "for is 0; expected an integer of 1 or more"),
        ("X > 5 for ever", "for: got ever; expected an integer from 1 to"),
        ("X > 5 Y", "at 15: unexpected 'a/y/total'; expected and, or, for or the end"),
        ("X > (5", "unexpected the end; expected ')'"),
        ("(X > 1) > 2", "at 1: a comparison; expected a number"),
        ("1 > 2", "a comparison names no metric"),
        ("X > 1e999", "1e999 is too large"),
        ("X > 1; import os", "unexpected ';'"),
        ("__import__('os') > 1", "at 12: unexpected"),
        (
            "grad/nrom/total > 1",
            "'grad/nrom/total' is not the name of a metric (did you mean 'grad/n",
        ),
        ("grad/norm > 1", "expected family/stat/scope, such as grad/norm/total"),
        ("grad/norm/layer/* > 1", "unexpected '*'"),
        ("(" * 60 + "X > 1" + ")" * 60, "more than 30 parts are inside one another"),
        ("X > 1 " + "or X > 1 " * 300, "longer than 1000 characters"),
    ],
)
def test_a_wrong_expression_is_refused_with_its_position(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(text.replace("X", X).replace("Y", Y))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_with_other_characters_stands_in_backticks() -> None:
    name = "lora/delta_ratio/module/base-model.layers.0"
    assert list(readings(parse(f"`{name}` > 1").condition)) == [name]


PIECES = (
    *(
        "grad/norm/total",
        "train/loss/total",
        "`a/b/c-d`",
        "a/b",
        "x",
        "median",
        "quantile",
        "delta",
    ),
    *("ema", "abs", "log", "and", "or", "not", "for", "steps", "(", ")", "(", ")", ",", "+", "-"),
    *("*", "/", "<", "<=", ">", ">=", "==", "!=", "=", "0", "1", "5", "0.5", "1e3", "1e999", "50"),
    *(" ", "  ", "\n", "\t", "`", "'", '"', ";", "{", "}", "\\", "\x00", "é", "٣", "²", "😀", "%"),
)


def _random_text(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.2:
        return "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(12)))
    joint = draw.choice(["", " "])
    return joint.join(draw.choice(PIECES) for _ in range(draw.randrange(30)))


def _valid(draw: random.Random, depth: int = 0) -> str:
    def number(deep: int) -> str:
        kind = draw.randrange(8 if deep < 5 else 3)
        metric = draw.choice((X, Y))
        if kind < 3:
            return (metric, f"{draw.uniform(0, 9):.3g}", f"median({metric}, {draw.randint(1, 9)})")[
                kind
            ]
        if kind == 3:
            return f"({number(deep + 1)} {draw.choice('+-*/')} {number(deep + 1)})"
        if kind == 4:
            return f"-{number(deep + 1)}"
        if kind == 5:
            return f"{draw.choice(['abs', 'log', 'sqrt'])}({number(deep + 1)})"
        if kind == 6:
            return f"{draw.choice(['delta', 'ema', 'std', 'min'])}({metric}, {draw.randint(1, 9)})"
        return f"quantile({metric}, {draw.random():.3f}, {draw.randint(1, 9)})"

    kind = draw.randrange(4 if depth < 4 else 1)
    if kind == 1:
        return f"not ({_valid(draw, depth + 1)})"
    if kind == 2:
        word = draw.choice(["and", "or"])
        return f"({_valid(draw, depth + 1)} {word} {_valid(draw, depth + 1)})"
    return f"{X} {draw.choice(['<', '<=', '>', '>=', '==', '!='])} {number(depth)}"


def test_no_text_raises_anything_but_an_input_error() -> None:
    draw = random.Random(0)
    records = _odd_records()
    for _ in range(4000):
        text = _random_text(draw)
        try:
            rule = Expression(when=text)
        except InputError:
            continue
        rule.check(records)


def test_every_valid_expression_is_parsed_and_checked_whatever_the_values() -> None:
    draw = random.Random(1)
    records = _odd_records()
    parsed = 0
    for _ in range(800):
        text = _valid(draw)
        if len(text) > 1000:
            continue
        rule = Expression(when=text)
        for length in (1, 7, len(records)):
            rule.check(records[:length])
        parsed += 1
    assert parsed > 500


def _odd_records() -> list[StepRecord]:
    odd = [0.0, -1.0, 1e308, -1e308, math.inf, -math.inf, math.nan, 5e-324, 3.0]
    draw = np.random.default_rng(0)
    return [
        StepRecord.of(i, 0.0, {X: draw.choice(odd)} | ({Y: draw.choice(odd)} if i % 3 else {}))
        for i in range(1, 40)
    ]
