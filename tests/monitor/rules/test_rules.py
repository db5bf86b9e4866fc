"""Each rule on a hand-made history: when it fires, and that it stays silent on a healthy run."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.rules import RuleSet, default_rules, make_rules
from ulysses_monitor.rules.kinds.levels import Vanishing
from ulysses_monitor.rules.kinds.lora import LoraImbalance
from ulysses_monitor.rules.kinds.sanity import NoLabels, NonFinite
from ulysses_monitor.rules.kinds.spikes import Spike

RATIO = "lora/grad_ratio_B_A/total"


def history(name: str, values: Sequence[float], **constant: float) -> list[StepRecord]:
    return [StepRecord.of(i, float(i), {name: v} | constant) for i, v in enumerate(values, 1)]


def fired(rules: Any, records: list[StepRecord]) -> list[tuple[str, int]]:
    """Returns rule and step of every alert, as a live run would give them."""
    rule_set = RuleSet(rules)
    return [(a.rule, a.step) for record in records for a in rule_set.observe(record)]


def noisy(count: int, mean: float, seed: int = 0) -> np.ndarray:
    return mean * (1 + 0.1 * np.random.default_rng(seed).standard_normal(count))


# -- non-finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_fires(loss: float) -> None:
    assert fired([NonFinite()], history("train/loss/total", [2.0, loss])) == [("nonfinite", 2)]


def test_non_finite_gradients_name_their_parameters_worst_first() -> None:
    names = {f"grad/nonfinite/param/layers.{i}.weight": float(i) for i in range(6)}
    record = StepRecord.of(7, 0.0, {"grad/nonfinite/total": 15.0, **names})
    (alert,) = NonFinite().check([record])
    assert (alert.metric, alert.value, alert.severity) == ("grad/nonfinite/total", 15.0, "critical")
    where = "layers.5.weight, layers.4.weight, layers.3.weight and 2 more"
    assert where in alert.message
    assert "layers.0.weight" not in alert.message


def test_finite_losses_and_gradients_do_not_fire() -> None:
    records = history("train/loss/total", [5.0, 0.0, 1e30], **{"grad/nonfinite/total": 0.0})
    assert fired([NonFinite()], records) == []
    assert fired([NonFinite()], history("other/x/total", [1.0])) == []


# -- spikes -----------------------------------------------------------------------------------


def test_a_spike_fires_at_its_step_and_not_while_the_run_warms_up() -> None:
    (rule,) = make_rules(["loss_spike"])
    values = noisy(200, 3.0)
    values[20], values[150] = 60.0, 80.0
    assert fired([rule], history("train/loss/total", values)) == [("loss_spike", 150 + 1)]


def test_a_gradient_spike_names_the_layer_with_the_largest_norm() -> None:
    values = [*noisy(100, 1.0), 40.0]
    layers = {"grad/norm/layer/0": 0.5, "grad/norm/layer/3": 39.0}
    records = history("grad/norm/total", values, **layers)
    (alert,) = Spike(metric="grad/norm/total").check(records)
    assert "most in layer/3" in alert.message
    assert alert.value == 40.0
    assert 1.9 < alert.threshold < 2.5
    assert alert.where == "layer/3"


def test_noise_a_falling_loss_and_nans_are_not_spikes() -> None:
    rule = Spike(metric="train/loss/total")
    falling = np.linspace(10, 2, 300) * noisy(300, 1.0)
    assert fired([rule], history("train/loss/total", falling)) == []
    with_nans = noisy(300, 3.0)
    with_nans[::3] = math.nan
    assert fired([rule], history("train/loss/total", with_nans)) == []


# -- labels, vanishing gradients, adapters ----------------------------------------------------


def test_a_step_without_a_label_fires_and_one_that_does_not_count_labels_does_not() -> None:
    records = history("train/loss_tokens/total", [10.0, 0.0, 10.0])
    assert fired([NoLabels()], records) == [("no_labels", 2)]
    assert fired([NoLabels()], history("train/loss/total", [0.0])) == []


def test_a_gradient_that_stays_far_below_its_start_fires_once() -> None:
    values = [*noisy(50, 1.0), *[1e-6] * 60]
    assert fired([Vanishing()], history("grad/norm/total", values)) == [
        ("vanishing_gradient", 50 + 10)
    ]


def test_a_small_but_steady_or_briefly_small_gradient_does_not_fire() -> None:
    assert fired([Vanishing()], history("grad/norm/total", noisy(200, 1e-7))) == []
    brief = noisy(200, 1.0)
    brief[100:109] = 1e-6
    assert fired([Vanishing()], history("grad/norm/total", brief)) == []


def test_a_healthy_adapters_start_from_an_infinite_ratio_does_not_fire() -> None:
    """B = 0 keeps A's gradient at zero: infinity, 117, 27, 8, 2.4 over a hundred steps."""
    ratios = [math.inf, *(120 * math.exp(-step / 25) + 2 for step in range(1, 300))]
    assert fired(default_rules(), history(RATIO, ratios)) == []


@pytest.mark.parametrize(("ratio", "side"), [(200.0, "A"), (math.inf, "A"), (1e-3, "B")])
def test_an_adapter_with_almost_no_gradient_on_one_side_fires(ratio: float, side: str) -> None:
    rule_set = RuleSet([LoraImbalance()])
    alerts = [a for record in history(RATIO, [ratio] * 200) for a in rule_set.observe(record)]
    assert [a.step for a in alerts] == [101]
    assert f"LoRA's {side} has had almost no gradient" in alerts[0].message


def test_a_brief_imbalance_and_an_unknown_ratio_do_not_fire() -> None:
    values = np.full(200, 2.0)
    values[120:139] = 500.0  # one step less than the rule's patience
    assert fired([LoraImbalance()], history(RATIO, values)) == []
    assert fired([LoraImbalance()], history(RATIO, [math.nan] * 200)) == []


def test_no_default_rule_fires_on_a_healthy_run() -> None:
    steps = np.arange(1, 401)
    rng = np.random.default_rng(1)
    loss = 2 + 8 * np.exp(-steps / 80) + 0.05 * rng.standard_normal(400)
    norms = np.exp(0.2 * rng.standard_normal(400)) * (1 + 5 * np.exp(-steps / 10))
    records = [
        StepRecord.of(
            int(step),
            0.0,
            {
                "train/loss/total": loss[i],
                "grad/norm/total": norms[i],
                "grad/nonfinite/total": 0.0,
                "train/loss_tokens/total": 512.0,
            },
        )
        for i, step in enumerate(steps)
    ]
    assert fired(default_rules(), records) == []


# -- the set ----------------------------------------------------------------------------------


class Always:
    name = "always"

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        step = history[-1].step
        if history[-1]["a/a/a"] < 0:
            return []
        return [
            Alert(rule="always", step=step, metric="a/a/a", value=1.0, threshold=0.0, message="m")
        ]


class Raises:
    name = "raises"

    def __init__(self) -> None:
        self.calls = 0

    def check(self, history: Sequence[StepRecord]) -> list[Alert]:
        self.calls += 1
        raise RuntimeError("broken rule")


class ReturnsNothing:
    name = "forgot_to_return"

    def check(self, history: Sequence[StepRecord]) -> Any:
        return None


def test_a_lasting_condition_fires_once_and_again_after_a_pause() -> None:
    records = history("a/a/a", [1, 1, 1, -1, 1, 1])
    assert fired([Always()], records) == [("always", 1), ("always", 5)]


def test_a_rule_that_raises_is_switched_off_and_others_continue(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = Raises()
    with caplog.at_level(logging.ERROR):
        assert fired([broken, Always()], history("a/a/a", [1] * 10)) == [("always", 1)]
    assert broken.calls == 3
    assert "broken rule" in caplog.text


def test_a_rule_that_returns_none_does_not_affect_others() -> None:
    assert fired([ReturnsNothing(), Always()], history("a/a/a", [1, 1])) == [("always", 1)]


def test_the_same_history_gives_the_same_alerts_live_and_at_once() -> None:
    values = noisy(150, 3.0)
    values[140] = 90.0
    records = history("train/loss/total", values)
    rule = Spike(metric="train/loss/total")
    assert fired([rule], records) == [("spike", a.step) for a in rule.check(records[:141])]
