from __future__ import annotations

import doctest
import logging
import math

import numpy as np
import pytest

from ulysses_monitor import Metric
from ulysses_monitor.records import trainer_names
from ulysses_monitor.records.trainer_names import (
    assign_names,
    evaluation_name,
    logged_name,
    name_numbers,
    tag_name,
)


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(trainer_names)
    assert result.attempted > 3
    assert not result.failed


NAMES = ["loss", "eval_loss", "rewards/chosen", "a b", "ä-1", "grad_norm", "eval_/data/my set_loss"]
ODD_NAMES = ["", "/", "/acc", "a//b/", "eval_", "eval/", "train/", "eval_/", " ", "\n"]


@pytest.mark.parametrize("name", NAMES + ODD_NAMES)
def test_a_logged_name_is_a_legal_metric(name: str) -> None:
    for metric, family in ((logged_name(name), "train"), (evaluation_name(name), "eval")):
        family = "eval" if name.startswith("eval") else family
        assert Metric(name=metric).name.startswith(f"{family}/") or name == "grad_norm"


def test_what_trl_logs_has_names() -> None:
    logs = {
        "rewards/accuracies": 0.75,
        "logps/chosen": -7.0,
        "entropy": math.nan,
        "mean_token_accuracy": np.float32(0.5),
        "completions/mean_length": 12,
        "kl": math.inf,
        "rewards/my reward/mean": 1.0,
    }
    found = name_numbers(logs)
    assert list(found) == [
        "train/rewards/accuracies/total",
        "train/logps/chosen/total",
        "train/entropy/total",
        "train/mean_token_accuracy/total",
        "train/completions/mean_length/total",
        "train/kl/total",
        "train/rewards/my_reward/mean/total",
    ]
    assert [type(value) for value in found.values()] == [float] * len(logs)


def test_what_the_monitor_measures_itself_and_the_progress_are_left_out() -> None:
    measured = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "train/loss": 1.0, "mfu": 0.4}
    progress = {"epoch": 0.1, "step": 3, "num_input_tokens_seen": 9, "tokens_per_second": 1.0}
    summary = {"train_loss": 1.0, "train_runtime": 2.0, "train_samples_per_second": 3.0}
    assert name_numbers(measured | progress | summary | {"total_flos": 1e9, "kl": 1.0}) == {
        "train/kl/total": 1.0
    }


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_an_evaluation_of_any_prefix_is_an_evaluation(is_evaluation: bool) -> None:
    logs = {"test_loss": 1.0, "test_runtime": 2.0, "test_samples_per_second": 3.0}
    logs |= {"eval_rewards/chosen": 0.5, "epoch": 1.0, "num_input_tokens_seen": 7}
    assert name_numbers(logs, is_evaluation=is_evaluation) == {
        "eval/test_loss/total": 1.0,
        "eval/test_runtime/total": 2.0,
        "eval/test_samples_per_second/total": 3.0,
        "eval/rewards/chosen/total": 0.5,
    }


def test_what_is_not_a_number_by_name_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logs = {"a": None, "b": "0.5", "c": [1.0], 3: 1.0, None: 2.0, "d": True, "e": 10**400}
    with caplog.at_level(logging.DEBUG):
        assert name_numbers({**logs, "a b": 1.0, "a_b": 2.0}) == {"train/a_b/total": 1.0}
    assert len(caplog.records) == len(logs) + 1


def test_a_trainers_number_has_one_name_in_its_log_and_in_tensorboard() -> None:
    pairs = {
        "loss": "train/loss",
        "eval_loss": "eval/loss",
        "grad_norm": "train/grad_norm",
        "learning_rate": "train/learning_rate",
        "rewards/chosen": "train/rewards/chosen",
        "train_runtime": "train/train_runtime",
    }
    for logged, tag in pairs.items():
        assert logged_name(logged) == tag_name(tag)


def test_other_tags_stay_unchanged() -> None:
    for tag in ("train/loss/total", "grad/norm/layer/3", "optim/lr/0", "Loss/test", "acc", "train"):
        assert tag_name(tag) == tag


def test_two_numbers_never_get_the_same_name() -> None:
    for tags in (["train/a b", "train/a_b"], ["train/loss", "train/loss/total"], ["a", "b"]):
        for order in (tags, tags[::-1]):
            names = assign_names(order, tag_name)
            assert len(set(names.values())) == len(tags)
            assert list(names) == order
