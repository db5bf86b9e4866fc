"""Answers during `ulysses train`: compared with references, and recorded every N steps."""

from __future__ import annotations

from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ulysses_monitor as um

pytestmark = [pytest.mark.usefixtures("compiled_deepspeed"), pytest.mark.timeout(600)]

SFT: dict[str, Any] = {
    "stage": "sft",
    "dataset": "pairs",
    "template": "default",
    "max_new_tokens": 4,
    "cutoff_len": 64,
    "val_size": 4,
    "max_steps": 3,
    "model_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": 0.2,  # so that every step depends on the random numbers before it
    },
}
ALONE = {"sequence_parallel_size": 1, "deepspeed": None}
METRICS = ["eval/bleu/total", "eval/rouge_l/total", "eval/exact_match/total"]


@pytest.fixture(scope="module")
def world(make_world: Any) -> Any:
    return make_world()


def train(world: Any, name: str, **changes: Any) -> Any:
    world.config(f"{name}.yaml", **{**SFT, "output_dir": f"runs/{name}", **changes})
    done = world.run("train", f"{name}.yaml", timeout=240)
    assert done.returncode == 0, done.stderr
    return um.open_run(world.path / "runs" / name)


@pytest.fixture(scope="module")
def shared(world: Any) -> Any:
    """Two ranks that share rows and, under ZeRO-3, weights."""
    return train(
        world,
        "shared",
        deepspeed="zero3",
        predict_with_generate=True,
        sample_answers_every=2,
        sample_prompts=["list <b>map</b>", "set"],
    )


@pytest.fixture(scope="module")
def alone(world: Any) -> Any:
    """One process."""
    return train(world, "alone", **ALONE, predict_with_generate=True, sample_answers_every=1)


def test_evaluations_compare_generated_answers_with_references(shared: Any) -> None:
    frame = shared.metrics("eval/*")
    assert frame[METRICS].notna().sum().eq(2).all()  # before and after the training
    assert frame[METRICS].stack().between(0, 100).all()
    assert (frame["eval/rouge_l/total"] > 0).any()


def test_ranks_that_share_weights_and_rows_give_the_metrics_of_one_process(
    shared: Any, alone: Any
) -> None:
    of_two, of_one = (run.metrics("eval/*")[METRICS].iloc[0] for run in (shared, alone))
    assert of_two.to_dict() == pytest.approx(of_one.to_dict(), rel=1e-9)


def test_fixed_prompts_are_answered_before_every_n_steps_and_after(shared: Any) -> None:
    events = shared.event_list("answers")
    assert [event["step"] for event in events] == [0, 2, 3]
    assert {tuple(event["prompts"]) for event in events} == {("list <b>map</b>", "set")}
    assert all(len(event["answers"]) == 2 for event in events)


def test_tensorboard_and_the_report_show_the_answers_as_text(shared: Any) -> None:
    board = EventAccumulator(str(shared.path / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Tensors("answers/2")] == [0, 2, 3]
    page = (shared.path / "report.html").read_text(encoding="utf-8")
    assert "list &lt;b&gt;map&lt;/b&gt;" in page
    assert "<b>map</b>" not in page


def test_answers_change_neither_weights_nor_random_states(world: Any, alone: Any) -> None:
    silent = train(world, "silent", **ALONE)
    weights = [(run.path / "model.safetensors").read_bytes() for run in (silent, alone)]
    assert weights[0] == weights[1]


def test_sft_answers_its_first_held_out_rows_by_default(alone: Any) -> None:
    events = alone.event_list("answers")
    assert [event["step"] for event in events] == [0, 1, 2, 3]
    assert len(events[0]["prompts"]) == len(events[0]["references"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predict_with_generate": True, "val_size": 0}, "set eval_dataset or val_size too"),
        ({"predict_with_generate": True, "packing": True}, "packing are both true"),
        ({"predict_with_generate": True, "stage": "pt", "dataset": "text"}, "expected stage sft"),
        ({"sample_answers_every": 0}, "sample_answers_every"),
        ({"sample_answers_every": 2, "monitor": False}, "monitor is false"),
        ({"sample_prompts": ["list"]}, "set sample_answers_every too"),
        (
            {"sample_answers_every": 2, "stage": "pt", "dataset": "text"},
            "stage pt needs a list of prompts",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(
    world: Any, changes: dict[str, Any], message: str
) -> None:
    world.config("wrong.yaml", **{**SFT, **changes})
    done = world.run("train", "wrong.yaml", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
