"""The benchmark of early warnings: when the loss shows a divergence, and one that is announced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks import lead_times
from benchmarks.faults.divergences import DIVERGENCES, ONSET


def test_there_are_eight_causes_or_more_and_five_early_warnings() -> None:
    assert len(DIVERGENCES) >= 8
    assert {"early_gradient", "early_activation", "early_attention"} <= lead_times.EARLY
    assert len(lead_times.EARLY) == 5


def test_the_loss_shows_a_divergence_where_it_leaves_its_twin() -> None:
    twin = np.linspace(4.0, 3.0, 160)
    losses = twin.copy()
    losses[120:] *= 1.2
    # A median of eight from step 117 on has five of the raised ones.
    assert lead_times._shows(losses, twin) == 117
    assert lead_times._shows(twin, twin) is None
    losses[100:] = np.nan
    assert lead_times._shows(losses, twin) is not None


def test_attention_logits_that_grow_are_announced_within_twenty_steps() -> None:
    setting = replace(lead_times.SIZES["first"], steps=ONSET + 20)
    alerts = lead_times._alerts(lead_times._train(setting, "queries_and_keys_that_grow"))
    assert [a.rule for a in alerts] == ["early_attention"]
    assert alerts[0].step >= ONSET
