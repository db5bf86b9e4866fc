"""Each rule of the project: a history on which it fires, at which step, and healthy ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ulysses_monitor.records import Alert, StepRecord
from ulysses_monitor.rules import BOOK, RuleSet, make_rules

Value = float | Callable[[int], float | None] | None

DRAW = np.random.default_rng(0).lognormal(0, 0.05, 400)


def noisy(mean: float) -> Callable[[int], float]:
    return lambda step: float(mean * DRAW[step])


def after(step: int, value: Value, before: Value = 1.0) -> Callable[[int], float | None]:
    """`before` until `step`, then `value`."""

    def at(now: int) -> float | None:
        chosen = value if now >= step else before
        return chosen(now) if callable(chosen) else chosen

    return at


def every(steps: int, value: Value) -> Callable[[int], float | None]:
    """A value that is measured at steps 1, 1 + `steps`, ..."""
    return lambda now: (
        None if now % steps != 1 else value(now) if callable(value) else value  # type: ignore[return-value]
    )


LOSS, NORM, RATE = "train/loss/total", "grad/norm/total", "optim/lr/0"
LAYERS = {f"grad/norm/layer/{i}": noisy(1.0) for i in range(4)}
PARAMS = {f"grad/norm/param/p{i}": noisy(1.0) for i in range(4)}
RATIO, REWARD = "optim/update_ratio/total", "train/reward/total"
SPEED, SECONDS = "train/tokens_per_second/total", "train/step_seconds/total"
MEMORY = "memory_bytes/total"


def _rising(start: int) -> Callable[[int], float | None]:
    """A value that is read at every second step and grows from `start` on."""
    return every(2, lambda step: noisy(2.0 * 1.05 ** max(0, step - start))(step))


# rule: metrics, and the step of the first alert
CASES: Mapping[str, tuple[Mapping[str, Value], int]] = {
    "nonfinite": ({"grad/nonfinite/total": after(7, 2.0, 0.0)}, 7),
    "skipped_steps": ({"grad/nonfinite/total": after(7, 2.0, 0.0)}, 11),
    "no_labels": ({"train/loss_tokens/total": after(7, 0.0, 9.0)}, 7),
    "loss_zero": ({LOSS: after(7, 0.0, noisy(2.0))}, 8),
    "loss_above_chance": ({"train/loss_over_chance/total": after(7, 2.0)}, 8),
    "random_in_evaluation": ({"eval/random_steps/total": every(10, 0.5)}, 1),
    "loss_beside_evaluation": ({LOSS: 8.0, "eval/loss/total": every(10, 4.0)}, 11),
    "loss_spike": ({LOSS: lambda s: 6.0 if s == 50 else noisy(2.0)(s)}, 50),
    "gradient_spike": ({NORM: lambda s: 9.0 if s == 50 else noisy(1.0)(s), **LAYERS}, 50),
    "divergence": ({LOSS: lambda s: noisy(2.0)(s) * (1.02 ** max(0, s - 60))}, 0),
    "loss_rises": ({LOSS: lambda s: noisy(2.0)(s) * (1.01 ** max(0, s - 80))}, 0),
    "plateau": ({LOSS: 2.0}, 208),
    "not_learning": ({LOSS: noisy(2.0), RATIO: every(10, 1e-6)}, 101),
    "loss_collapse": ({LOSS: after(60, 0.01, noisy(2.0))}, 67),
    "loss_without_noise": ({LOSS: lambda s: 4.0 * 0.99**s}, 49),
    "vanishing_gradient": ({NORM: after(60, 1e-6, noisy(1.0))}, 69),
    "exploding_gradient": ({NORM: after(60, 99.0, noisy(1.0))}, 64),
    "vanishing_layer": ({**LAYERS, "grad/norm/layer/2": 1e-6}, 11),
    "exploding_layer": ({**LAYERS, "grad/norm/layer/2": 500.0}, 11),
    "layer_shift": ({**LAYERS, "grad/norm/layer/2": after(60, 9.0)}, 61),
    "no_gradient": ({**PARAMS, "grad/norm/param/p2": after(10, 0.0)}, 29),
    "does_not_move": (
        {
            **PARAMS,
            **{f"optim/update_ratio/param/p{i}": every(10, 1e-3) for i in range(3)},
            "optim/update_ratio/param/p3": every(10, 0.0),
        },
        21,
    ),
    "nothing_moves": ({RATIO: every(10, 0.0), RATE: 1e-3, NORM: 1.0}, 1),
    "update_ratio_large": ({RATIO: every(10, 0.5)}, 21),
    "update_ratio_small": ({RATIO: every(10, 1e-7), RATE: 1e-3}, 11),
    "gradients_not_cleared": ({"grad/carried/total": after(7, 1.0, 0.0)}, 8),
    "gradients_accumulate": ({NORM: lambda s: float(s)}, 25),
    "state_not_updated": ({"optim/exp_avg_norm/total": every(10, 0.3), NORM: 1.0}, 11),
    "second_moment_small": ({"optim/exp_avg_sq_mean/total": every(10, 1e-20), NORM: 1.0}, 11),
    "weights_jump": (
        {
            "param/norm/total": every(10, 1.0),
            **{f"param/norm/layer/{i}": every(10, 1.0) for i in range(3)},
            "param/norm/layer/3": every(10, after(60, 2.0)),
            **{f"optim/update_ratio/layer/{i}": every(10, 1e-3) for i in range(4)},
        },
        61,
    ),
    "weights_shrink": ({"param/norm/total": every(10, after(60, 0.5))}, 71),
    "state_lost": (
        {
            "param/norm/total": every(10, 1.0),
            "optim/exp_avg_norm/total": every(10, after(40, 0.1, None)),
        },
        41,
    ),
    "tie_lost": ({"param/untied/total": after(7, 1.0, 0.0)}, 7),
    "adapter_without_gradient": (
        {
            **{f"grad/norm/param/0.lora_{side}.default.weight": 1.0 for side in "AB"},
            **{f"grad/norm/param/1.lora_{side}.default.weight": after(10, 0.0) for side in "AB"},
        },
        11,
    ),
    "lora_imbalance": ({"lora/grad_ratio_B_A/total": 200.0}, 101),
    "lora_idle": ({"lora/delta_ratio/total": every(10, 0.0)}, 21),
    "lora_rank_collapse": ({"lora/stable_rank/total": every(10, after(60, 1.0, 3.0))}, 81),
    "lora_outgrows_base": ({"lora/delta_ratio/total": every(10, 3.0)}, 11),
    "rate_zero": ({RATE: after(60, 0.0)}, 61),
    "rate_jump": ({RATE: after(60, 9.0)}, 60),
    "rate_reset": ({RATE: lambda s: s - 29.0}, 35),
    "rate_off_schedule": ({"optim/lr_off_schedule/0": after(60, -0.3, 0.0)}, 61),
    "loss_after_resume": (
        {LOSS: noisy(3.0), "train/loss_before_resume/total": lambda s: 2.0 if s == 30 else None},
        33,
    ),
    "rate_out_of_range": ({"optim/exp_avg_sq_mean/total": every(10, 1.0), RATE: 0.5}, 1),
    "always_clipping": ({"grad/clip_coef/total": 0.01}, 72),
    "replica_drift": ({"param/mismatch/total": every(10, after(60, 2.0, 0.0))}, 61),
    "same_data_on_ranks": ({"train/loss_rank_std/total": after(60, 0.0, 0.1)}, 61),
    "straggler": ({"train/seconds_rank_std/total": after(20, 0.2, 1e-3), SECONDS: 0.5}, 23),
    "betas_swapped": ({"optim/beta1/0": every(10, 0.999), "optim/beta2/0": every(10, 0.9)}, 1),
    "epsilon_large": ({"optim/eps/0": every(10, 0.1), "optim/beta2/0": every(10, 0.999)}, 1),
    "decay_strong": ({"optim/weight_decay/0": every(10, 10.0), RATE: after(15, 1e-3, 1e-6)}, 21),
    "labels_misaligned": (
        {
            "data/label_own/total": after(7, 0.1),
            "data/label_copied/total": after(7, 0.95, 0.0),
            "data/label_ahead/total": 0.0,
        },
        8,
    ),
    "labels_changed": ({"data/label_own/total": after(60, 0.3)}, 60),
    "ends_not_trained": ({"data/end_trained/total": 0.0, "data/end_tokens/total": 3.0}, 3),
    "special_tokens": ({"data/special_tokens/total": after(7, 0.5, 0.05)}, 11),
    "duplicate_rows": ({"data/duplicate_rows/total": lambda s: float(s > 60 and s % 2)}, 79),
    "truncated_rows": ({"data/rows_at_longest/total": after(60, 0.8, 0.1)}, 78),
    "padding_trained": ({"data/label_padded/total": after(7, 0.2, 0.0)}, 8),
    "dominant_token": ({"data/dominant_token/total": after(7, 0.4, 0.05)}, 11),
    "data_changed": ({"data/token_overlap/total": lambda s: noisy(0.8 if s < 60 else 0.4)(s)}, 0),
    "overfitting": (
        {LOSS: lambda s: 4.0 * 0.99**s, "eval/loss/total": every(20, lambda s: 2.0 + s / 200)},
        61,
    ),
    "evaluation_stuck": (
        {LOSS: lambda s: 4.0 * 0.99**s, "eval/loss/total": every(20, lambda s: 2.0 + s / 1e5)},
        121,
    ),
    "token_accuracy_perfect": ({"train/mean_token_accuracy/total": 1.0}, 5),
    "throughput_drop": ({SPEED: after(100, 100.0, 900.0), SECONDS: 1.0}, 111),
    "stall": ({SECONDS: lambda s: 90.0 if s == 60 else 1.0}, 60),
    "memory_creep": ({f"system/host_{MEMORY}": lambda s: 1e9 + 2e7 * s}, 128),
    "device_memory_creep": (
        {"system/device_memory_allocated_bytes/total": lambda s: 1e9 + 2e7 * s},
        128,
    ),
    "entropy_collapse": ({"train/entropy/total": after(60, 0.1, 2.0)}, 62),
    "entropy_explosion": ({"train/objective/entropy/total": after(60, 9.0, 2.0)}, 62),
    "kl_runaway": ({"train/kl/total": after(60, 3.0, 0.1)}, 62),
    "clip_fraction_high": ({"train/clip_ratio/region_mean/total": after(60, 0.6, 0.1)}, 63),
    "value_loss_explosion": ({"train/value_loss/total": after(60, 30.0)}, 62),
    "sampler_mismatch": ({"train/sampling/sampling_logp_difference/mean/total": 0.3}, 3),
    "importance_ratio_off": ({"train/val/ratio/total": 3.0}, 3),
    "length_hacking": (
        {
            "train/completions/mean_length/total": lambda s: 50.0 + s,
            REWARD: lambda s: s / 100 + 0.01 * DRAW[s],
        },
        0,
    ),
    "length_collapse": ({"train/completions/mean_length/total": after(60, 5.0, 50.0)}, 62),
    "truncated_answers": ({"train/completions/clipped_ratio/total": 0.9}, 5),
    "zero_advantage": ({"train/frac_reward_zero_std/total": 1.0}, 5),
    "reward_spread_zero": ({"train/reward_std/total": 0.0}, 5),
    "reward_constant": ({REWARD: 0.5}, 10),
    "reward_collapse": ({REWARD: lambda s: noisy(s / 100)(s) if s < 100 else -1.0}, 0),
    "reward_outlier": ({REWARD: lambda s: 90.0 if s == 60 else noisy(1.0)(s)}, 60),
    "rewards_divided": (
        {
            "train/rewards/format/mean/total": lambda s: noisy(0.5 + s / 100)(s),
            "train/rewards/correct/mean/total": lambda s: noisy(2.0 - s / 100)(s),
        },
        0,
    ),
    "format_hacking": (
        {
            "train/rewards/think_format/mean/total": lambda s: noisy(min(1.0, s / 40))(s),
            "train/rewards/accuracy/mean/total": 0.0,
        },
        0,
    ),
    "reward_bimodal": ({"train/reward_bimodality/total": after(60, 0.8, 0.4)}, 64),
    "reference_drift": ({"train/kl/total": lambda s: noisy(s / 50)(s)}, 0),
    "chosen_falls": ({"train/rewards/chosen/total": -9.0}, 4),
    "preference_margin_runaway": ({"train/rewards/margins/total": 50.0}, 4),
    "preference_sides_equal": ({"train/rewards/margins/total": 0.0}, 4),
    "preferences_inverted": ({"train/rewards/accuracies/total": 0.1}, 31),
    "early_gradient": ({NORM: lambda s: noisy(1.05 ** max(0, s - 100))(s), LOSS: 2.0}, 0),
    "early_activation": ({"activation/rms/total": _rising(100)}, 0),
    "early_kurtosis": ({"activation/kurtosis/total": _rising(100)}, 0),
    "early_attention": ({"attention/logit_max/total": _rising(100)}, 0),
    "early_update": (
        {RATIO: every(2, lambda s: noisy(1e-3 * 1.05 ** max(0, s - 100))(s)), LOSS: 2.0},
        0,
    ),
}


RESUMED = ("rate_reset", "state_lost", "loss_after_resume")


def alerts(
    rules: Any, metrics: Mapping[str, Value], steps: int = 250, first: int = 1
) -> list[Alert]:
    rule_set = RuleSet(make_rules(rules))
    found = []
    for step in range(first, steps + 1):
        values = {n: v(step) if callable(v) else v for n, v in metrics.items()}
        known = {name: value for name, value in values.items() if value is not None}
        found += rule_set.observe(StepRecord.of(step, 0.0, {"my/own/total": 1.0, **known}))
    return found


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(BOOK)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_on_its_fault_and_says_all_that_an_alert_has_to(name: str) -> None:
    metrics, step = CASES[name]
    found = alerts([name], metrics, first=30 if name in RESUMED else 1)
    assert found, "no alert"
    first = found[0]
    assert step in (0, first.step)
    assert first.rule == name
    assert first.message.startswith(f"Step {first.step}: ")
    assert first.message.endswith(".")
    assert first.hint
    assert len(first.causes) >= 2
    assert first.page == f"docs/rules/{name}.md"
    assert np.isfinite([first.value, first.threshold]).all()


@pytest.mark.parametrize("name", CASES)
def test_a_rule_without_its_metrics_is_silent_and_says_so(name: str) -> None:
    rule_set = RuleSet(make_rules([name]))
    for step in range(1, 5):
        assert rule_set.observe(StepRecord.of(step, 0.0, {"my/own/total": 1.0})) == []
    assert "is not recorded" in rule_set.unchecked()[name]


@pytest.mark.parametrize(("step", "rules"), [(60, ["default"]), (60, ["strict"])])
def test_missing_values_and_infinities_break_no_rule(step: int, rules: list[str]) -> None:
    names = sorted({need for e in BOOK.values() for need in e.make().needs if "*" not in need})
    draw = np.random.default_rng(3)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e300, 1.0, 1.0, 1.0, 2.0])

    class Raises:
        def call(self, part: str, function: Any, default: Any, **_: Any) -> Any:
            return function()

        def is_off(self, part: str) -> bool:
            return False

    rule_set = RuleSet(make_rules(rules), Raises())  # type: ignore[arg-type]
    extra = [f"grad/norm/layer/{i}" for i in range(4)] + [f"grad/norm/param/p{i}" for i in range(4)]
    extra += [
        f"{k}/{s}" for k in ("param/norm", "optim/update_ratio") for s in ("layer/0", "layer/1")
    ]
    extra += ["train/rewards/a/mean/total", "train/rewards/b/mean/total", "optim/lr/1"]
    with np.errstate(all="ignore"):
        for now in range(1, 4 * step):
            chosen = [n for n in [*names, *extra] if draw.random() < 0.8]
            rule_set.observe(StepRecord.of(now, 0.0, {n: draw.choice(odd) for n in chosen}))


def test_a_healthy_run_of_all_metrics_raises_nothing() -> None:
    rng = np.random.default_rng(5)
    noise = rng.lognormal(0, 0.15, (64, 420))

    def random(i: int, mean: float = 1.0) -> Callable[[int], float]:
        return lambda step: float(mean * noise[i, step])

    def often(value: Callable[[int], float]) -> Callable[[int], float | None]:
        return lambda step: value(step) if step % 10 == 1 else None

    metrics: dict[str, Value] = {
        LOSS: lambda s: (1.5 + 3 * np.exp(-s / 80)) * noise[0, s] ** 0.2,
        NORM: lambda s: (1 + 4 * np.exp(-s / 10)) * noise[1, s] ** 2,
        "grad/nonfinite/total": 0.0,
        "grad/clip_coef/total": lambda s: min(1.0, 1 / noise[1, s]),
        "train/loss_tokens/total": 512.0,
        "train/loss_rank_std/total": random(2, 0.1),
        "train/seconds_rank_std/total": random(26, 0.01),
        "train/loss_over_chance/total": lambda s: (1.5 + 3 * np.exp(-s / 80)) / 4.6,
        "param/untied/total": 0.0,
        RATE: lambda s: 1e-3 * min(s / 20, 1.0) * (1 - s / 450),
        SPEED: random(3, 900.0),
        SECONDS: random(4),
        f"system/host_{MEMORY}": lambda s: 1e9 * (1 + min(s, 50) / 500),
        RATIO: often(random(5, 2e-3)),
        "optim/exp_avg_norm/total": often(random(6)),
        "optim/exp_avg_sq_mean/total": often(random(7, 1e-6)),
        "param/norm/total": often(lambda s: 9.0 + s / 1000),
        "lora/delta_ratio/total": often(lambda s: s / 1000),
        "lora/stable_rank/total": often(random(8, 2.0)),
        "lora/grad_ratio_B_A/total": lambda s: 120 * np.exp(-s / 25) + 2 * noise[9, s],
        "eval/loss/total": lambda s: 1.6 + 3 * np.exp(-s / 80) if s % 50 == 0 else None,
        "param/mismatch/total": often(lambda _: 0.0),
        "optim/lr_off_schedule/0": lambda s: 0.01 * (noise[27, s] - 1),
        "train/loss_before_resume/total": lambda s: 4.6 if s == 1 else None,
    }
    for i in range(4):
        metrics[f"grad/norm/layer/{i}"] = random(10 + i, 1 + i)
        metrics[f"grad/norm/param/p{i}"] = random(14 + i)
        metrics[f"param/norm/layer/{i}"] = often(lambda s: 9.0 + s / 1000)
        metrics[f"optim/update_ratio/layer/{i}"] = often(random(18 + i, 2e-3))
        metrics[f"optim/update_ratio/param/p{i}"] = often(random(22 + i, 2e-3))
    assert [(a.rule, a.step) for a in alerts("default", metrics, 400) if a.severity != "info"] == []


def test_an_adapter_that_stays_zero_although_it_has_a_gradient_does_not_move() -> None:
    """Its update ratio is 0 / 0, and LoRA's B begins so."""
    metrics: dict[str, Value] = dict(PARAMS)
    for i in range(4):
        metrics[f"optim/update_ratio/param/p{i}"] = every(10, np.nan if i == 3 else 1e-3)
        metrics[f"param/norm/param/p{i}"] = every(10, 0.0 if i == 3 else 1.0)
    (alert,) = alerts(["does_not_move"], metrics)
    assert (alert.step, alert.where) == (21, "p3")
    metrics["param/norm/param/p3"] = every(10, 1.0)  # the ratio could not be measured
    assert alerts(["does_not_move"], metrics) == []


def test_a_fresh_run_and_a_resumed_one_that_has_its_state_lost_none() -> None:
    metrics = dict(CASES["state_lost"][0])
    assert alerts(["state_lost"], metrics) == []
    metrics["optim/exp_avg_norm/total"] = every(10, 0.1)
    assert alerts(["state_lost"], metrics, first=30) == []


def test_an_adapter_of_which_one_side_has_a_gradient_is_not_without() -> None:
    names = [f"grad/norm/param/{i}.lora_{side}.default.weight" for i in "01" for side in "AB"]
    metrics: dict[str, Value] = dict.fromkeys(names, 1.0)
    metrics[names[2]] = 0.0  # A, while B is zero
    assert alerts(["adapter_without_gradient"], metrics) == []
    metrics[names[3]] = 0.0
    assert "1 adapters" in alerts(["adapter_without_gradient"], metrics)[0].message
    assert alerts(["adapter_without_gradient"], dict.fromkeys(names, 0.0)) == []
    experts = {n.replace("param/1.", "param/experts.1."): v for n, v in metrics.items()}
    assert alerts(["adapter_without_gradient"], experts) == []


def test_a_loss_that_falls_fast_is_not_a_multiple_of_the_evaluations() -> None:
    falling = {LOSS: lambda s: 8.0 * 0.9**s, "eval/loss/total": every(5, lambda s: 8.0 * 0.9**s)}
    assert alerts(["loss_beside_evaluation"], falling) == []
    overfitting = {LOSS: 0.1, "eval/loss/total": every(5, 4.0)}
    assert alerts(["loss_beside_evaluation"], overfitting) == []


def test_ranks_that_are_apart_by_little_of_a_step_have_no_straggler() -> None:
    metrics: dict[str, Value] = {"train/seconds_rank_std/total": 0.1, SECONDS: 1.0}
    assert alerts(["straggler"], metrics) == []
    assert alerts(["straggler"], {**metrics, SECONDS: 0.5})
    small = {"train/seconds_rank_std/total": 0.01, SECONDS: 0.02}
    assert alerts(["straggler"], small) == []


def test_ends_that_were_trained_once_are_not_lost_where_only_prompts_have_some() -> None:
    metrics: dict[str, Value] = {"data/end_tokens/total": 3.0}
    metrics["data/end_trained/total"] = lambda step: 0.5 if step == 2 else 0.0
    assert alerts(["ends_not_trained"], metrics) == []
    rare = {"data/end_tokens/total": every(100, 3.0), "data/end_trained/total": every(100, 0.0)}
    assert [a.step for a in alerts(["ends_not_trained"], rare)] == [201]


def test_a_share_that_is_large_at_single_steps_is_not_large_on_the_mean() -> None:
    for name, metric in (
        ("duplicate_rows", "data/duplicate_rows/total"),
        ("truncated_rows", "data/rows_at_longest/total"),
        ("special_tokens", "data/special_tokens/total"),
    ):
        assert alerts([name], {metric: lambda s: float(s % 4 == 0)}) == []
        assert alerts([name], {metric: lambda s: 1.0 if s < 3 else None}) == []


def test_losses_after_a_resume_that_are_as_before_or_few_of_which_are_high_are_none() -> None:
    metrics = dict(CASES["loss_after_resume"][0])
    metrics[LOSS] = noisy(2.2)
    assert alerts(["loss_after_resume"], metrics, first=30) == []
    metrics[LOSS] = lambda s: 9.0 if s < 33 else 2.0
    assert alerts(["loss_after_resume"], metrics, first=30) == []


def rewards(**functions: Value) -> list[Alert]:
    named = {f"train/rewards/{name}/mean/total": value for name, value in functions.items()}
    return alerts(["format_hacking"], named)


def learnt(start: int, top: float = 1.0) -> Callable[[int], float]:
    return lambda s: noisy(min(1.0, max(0.02, (s - start) / 30)) * top)(s)


def test_a_form_that_is_learnt_before_the_task_is_no_hacking() -> None:
    assert rewards(format_reward=learnt(0), accuracy=learnt(20, 0.3)) == []
    assert rewards(format_reward=learnt(0), accuracy=noisy(0.3)) != []


def test_only_rewards_for_what_is_said_tell_whether_a_form_is_hacked() -> None:
    assert rewards(format_reward=learnt(0), length_penalty=0.0) == []
    assert rewards(format_reward=learnt(0), language=1.0) == [], "reached from the start"
    assert rewards(brief=learnt(0), accuracy=0.0) == [], "not the form"
    assert rewards(format_reward=noisy(1.0), accuracy=0.0) == [], "nothing was learnt"


def test_a_divergence_that_the_reference_holds_is_no_drift() -> None:
    held: Value = lambda s: noisy(4.0 * (1 - np.exp(-s / 40)))(s)  # noqa: E731 - as in CASES
    assert alerts(["reference_drift"], {"train/kl/total": held}) == []
