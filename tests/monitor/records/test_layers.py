"""Layers are ordered by number, and within their lists if a model has several."""

from __future__ import annotations

import doctest

from ulysses_monitor.records import layers


def test_the_examples_run() -> None:
    result = doctest.testmod(layers)
    assert result.attempted
    assert not result.failed
