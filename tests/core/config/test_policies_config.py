"""Policies in a config are checked when it is read, and the doctor warns about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ulysses_core.cli.policy_warnings import find_policy_warnings
from ulysses_core.config import RunConfig
from ulysses_core.trainers.stage import load_config
from ulysses_monitor.common.errors import InputError

MINIMAL = """
model_name_or_path: some/model
dataset: a
monitor:
"""


def load(folder: Path, monitor: str, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(MINIMAL + monitor)
    return load_config(path, overrides)


def test_a_config_sets_policies_their_mode_and_their_seed(tmp_path: Path) -> None:
    monitor = load(tmp_path, "  policies: adaptive\n  mode: off\n  seed: 3").settings.monitor
    assert (monitor.policies, monitor.mode, monitor.seed) == ("adaptive", "off", 3)
    text = """
  policies:
    - zclip: {z: 3}
    - gradient_noise: {std: 1e-4, late: off}
    - my_package.module:my_function
    """
    assert len(load(tmp_path, text).settings.monitor.policies) == 3
    monitor = load(tmp_path, "  sample_every: 5", "monitor.policies=[zclip]").settings.monitor
    assert monitor.policies == ["zclip"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  policies: adaptiv", "did you mean 'adaptive'"),
        ("  policies: [{zclip: {zz: 3}}]", "unknown setting 'zz' (did you mean 'z'?); allowed: "),
        ("  policies: [{zclip: {z: -3}}]", "z is -3; expected a number above 0"),
        ("  policies: [{zclip: {late_start: 0.5}}]", "late_start"),
        ("  policies: nowhere.yaml", "nowhere.yaml: No such file"),
        ("  mode: sometimes", "monitor.mode is 'sometimes'; allowed: off, shadow, active"),
    ],
)
def test_a_wrong_policy_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0


def warn(folder: Path, monitor: str, trained: int, *overrides: str) -> dict[str, str]:
    return dict(find_policy_warnings(load(folder, monitor, *overrides), trained))


def test_a_threshold_that_does_not_suit_the_size_of_the_model_gives_a_warning(
    tmp_path: Path,
) -> None:
    large = warn(tmp_path, "  policies: [lr_boost, clip_threshold]", 16_800_000)
    # 16.8 million elements of a gradient of norm 1 have a mean size of 2e-4.
    assert "it always acts" in large["lr_boost"]
    assert "0.0002" in large["lr_boost"]
    assert "25," in large["clip_threshold"].split("norm of ")[1]
    assert warn(tmp_path, "  policies: [lr_boost]", 1_000) == {}
    relative = "  policies: [{lr_boost: {relative: true, below: 0.01}}, zclip]"
    assert warn(tmp_path, relative, 16_800_000) == {}


def test_noise_larger_than_the_gradient_gives_a_warning(tmp_path: Path) -> None:
    found = warn(tmp_path, "  policies: [annealed_noise]", 1_000_000)
    assert "norm of 100" in found["annealed_noise"]
    assert warn(tmp_path, "  policies: [{annealed_noise: {eta: 1e-10}}]", 1_000_000) == {}


def test_scaling_gives_a_warning_under_adam_but_not_under_sgd(tmp_path: Path) -> None:
    text = "  policies: [{scale_small: {relative: true, below: 0.5, own_below: 0.5}}]"
    assert "under Adam" in warn(tmp_path, text, 1000)["scale_small"]
    assert warn(tmp_path, text, 1000, "optim=sgd") == {}


def test_policies_that_are_off_give_no_warning(tmp_path: Path) -> None:
    assert warn(tmp_path, "  policies: ulysses-pro\n  mode: off", 16_800_000) == {}


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("  rules: off", "off"),
        ("  rules: default", "default"),
        (
            "  rules: [nonfinite, {loss_spike: {sigmas: 4}}]",
            ["nonfinite", {"loss_spike": {"sigmas": 4}}],
        ),
        ("  rules: [default, my_package.module:my_rule]", ["default", "my_package.module:my_rule"]),
    ],
)
def test_rules_are_named_like_policies(tmp_path: Path, text: str, rules: Any) -> None:
    assert load(tmp_path, text).settings.monitor.rules == rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  rules: none", "rules: 'none' is not a rule"),
        ("  rules: [{loss_spike: {sigma: 4}}]", "unknown setting 'sigma' (did you mean 'sigmas'?)"),
        ("  rules: {loss_spike: {}}", "rules: got dict; expected a list of rules"),
    ],
)
def test_a_wrong_rule_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0
