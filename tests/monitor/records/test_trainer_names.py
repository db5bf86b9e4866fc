from __future__ import annotations

import doctest

import pytest

from ulysses_monitor import Metric
from ulysses_monitor.records import trainer_names
from ulysses_monitor.records.trainer_names import (
    assign_names,
    evaluation_name,
    logged_name,
    tag_name,
)


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(trainer_names)
    assert result.attempted > 3
    assert not result.failed


@pytest.mark.parametrize("name", ["loss", "eval_loss", "rewards/chosen", "a b", "ä-1", "grad_norm"])
def test_a_logged_name_is_a_legal_metric(name: str) -> None:
    Metric(name=logged_name(name))
    Metric(name=evaluation_name(name))


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
