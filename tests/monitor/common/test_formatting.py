"""Numbers, shares, durations and times as people read them."""

from __future__ import annotations

import pytest

from ulysses_monitor.common.formatting import change, count, duration, number, share, tick, when

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999.96, "1.00k"),
        (123.4, "123"),
        (1e9, "1.00B"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (-INF, "\N{MINUS SIGN}∞"),
        (NAN, "NaN"),
        ("nan", "NaN"),
        (None, "—"),
        ("inf", "∞"),
        ("text", "—"),
        (0.0009996, "0.00100"),
        (0.00012, "1.20e-4"),
        (3e20, "3.00e20"),
    ],
)
def test_a_number_has_three_digits_and_a_suffix(value: object, text: str) -> None:
    assert number(value) == text


def test_ticks_shares_durations_counts_changes_and_times_are_formatted() -> None:
    assert [tick(v) for v in (10, 100, 1, 0.5, 2e-5, 12_000, 1.05)] == [
        *("10", "100", "1", "0.5", "2e-5", "12k", "1.05")
    ]
    assert [share(v) for v in (0.0083, 0.331, 1e-6, 0, 1, None)] == [
        *("0.83%", "33.1%", "<0.01%", "0%", "100%", "—")
    ]
    assert [duration(v) for v in (0.5, 59.4, 3_900, 200_000, NAN)] == [
        *("0.5 s", "59.4 s", "1 h 5 min", "2 d 7 h", "—")
    ]
    assert (count(12_000), count(INF), change(None, None), change(INF, 2)) == (
        *("12,000", "—", "—", "∞ → 2.00"),
    )
    assert when("never") == when(NAN) == when(1e300) == "—"
