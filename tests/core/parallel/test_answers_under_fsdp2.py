"""Sampling while FSDP2 shares the weights: answers as on one process, and no weight changes by it.

Ranks that share weights but not rows must generate together, each as long as the longest answer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.forget import forget_last_trainer
from tests.support.parity_cases import ParityCase, build, find_engine, shard, write_rows
from tests.support.sequence_cases import weights_of
from tests.support.spawn import spawn

PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]
EVALUATED: dict[str, Any] = {
    "eval_dataset": "conversations",
    "per_device_eval_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_on_start": True,
}
COMPARED = ("eval_bleu", "eval_rouge_l", "eval_exact_match")


def train(settings: dict[str, Any], folder: str, answers: bool) -> dict[str, Any]:
    """The child: two steps, with answers to prompts before and after each if `answers`."""
    import ulysses_core as uc
    from ulysses_core.config.answers import AnswersConfig
    from ulysses_core.trainers.answering import compare_in_evaluations, record_answers
    from ulysses_core.trainers.stage import load_config

    case = ParityCase(**settings)
    trainer = build(case, folder, **EVALUATED if answers else {})
    uc.sequence_parallel(trainer, case.size)
    if case.engine == "fsdp2":
        shard(trainer)
    given = AnswersConfig(sample_prompts=PROMPTS, sample_answers_every=1, max_new_tokens=6)
    data = load_config(Path(trainer.args.output_dir, "config.yaml")).data
    config: Any = SimpleNamespace(data=data, answers=given)
    found: dict[str, Any] = {"answers": []}
    session = SimpleNamespace(event=lambda _, about: found["answers"].append(about["answers"]))
    if answers:
        monitor: Any = SimpleNamespace(session=session)
        record_answers(trainer, monitor, config)
        compare_in_evaluations(trainer, config)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_bleu" in entry]
    found["metrics"] = [[entry[name] for name in COMPARED] for entry in logged]
    found["engine"] = find_engine(trainer)
    found["weights"] = weights_of(trainer.accelerator.unwrap_model(trainer.model))
    forget_last_trainer()
    return found


def train_sampled(settings: dict[str, Any], folder: str) -> tuple[str, int]:
    """The child: two steps of stage grpo with short answers on one rank, long on the other."""
    case = ParityCase(**settings)
    trainer = build(case, folder)
    steps = 0

    def like(_: Any, __: Any, logits: Any) -> None:
        nonlocal steps
        steps += 1  # of sampling; to train, TRL takes the head's weight
        logits[..., 1] += 30 if dist.get_rank() == 0 else -30  # the eos token

    trainer.model.get_output_embeddings().register_forward_hook(like)
    shard(trainer)
    trainer.train()
    engine = find_engine(trainer)
    assert trainer.state.global_step == 2
    forget_last_trainer()
    return engine, steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("answers")
    write_rows(made)
    return made


@cache
def train_alone(adapters: bool, folder: Path) -> dict[str, Any]:
    case = ParityCase(kind="sft", adapters=adapters, size=1)
    return spawn(train, 1, args=[vars(case), str(folder), True])[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("size", "adapters"),
    [
        (1, True),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [(1, False), (2, True), (2, False)]
        ),
    ],
)
def test_answers_are_those_of_one_process_and_change_no_weight(
    size: int, adapters: bool, folder: Path
) -> None:
    case = ParityCase(kind="sft", engine="fsdp2", adapters=adapters, size=size)
    silent, answering = (
        spawn(train, 2, args=[vars(case), str(folder), answers]) for answers in (False, True)
    )
    alone = train_alone(adapters, folder)
    for one, other in zip(silent, answering, strict=True):
        assert one["engine"] == other["engine"] == "fsdp2"
        same = 3 if size == 2 else 1  # ranks that do not share rows train on others
        assert other["answers"][:same] == alone["answers"][:same]
        assert len(other["metrics"]) == 3
        for found, expected in zip(other["metrics"][:same], alone["metrics"], strict=False):
            assert found == pytest.approx(expected, rel=1e-9)
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.timeout(200)
@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=pytest.mark.full)])
def test_ranks_that_share_weights_sample_together(adapters: bool, folder: Path) -> None:
    case = ParityCase(kind="grpo", engine="fsdp2", adapters=adapters, size=1)
    first, second = spawn(train_sampled, 2, args=[vars(case), str(folder)], timeout=60)
    assert first == second == ("fsdp2", 6)  # as long as the longest answer
