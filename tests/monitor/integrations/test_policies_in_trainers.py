"""Policies on Hugging Face's Trainer: plain, DDP, ZeRO-2 and ZeRO-3.

A check runs within the children, on every rank, and says there what is wrong; each is a test here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ulysses_monitor as um
from tests.support.forget import forget_last_trainer
from tests.support.hf_cases import (
    build_trainer,
    rank,
    run_checks,
    weights,
)
from tests.support.spawn import spawn

Told = list[dict[str, Any]]


def train(
    engine: str,
    folder: Path,
    policies: Any,
    *,
    name: str = "run",
    resume: str | None = None,
    more_policies: Any = None,
    **settings: Any,
) -> Any:
    """A Trainer that trained under a monitor with `policies`, and perhaps under a second one."""
    monitor = um.Monitor(folder / name, policies=policies, tensorboard=False, rules=[])
    trainer = build_trainer(engine, folder, **settings)
    monitor.attach(trainer)
    if more_policies is not None:
        um.Monitor(
            folder / f"{name}-2", policies=more_policies, tensorboard=False, rules=[]
        ).attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    found = weights(trainer)
    trainer.stopped = monitor.stopped
    forget_last_trainer()
    return trainer, found


def actions(folder: Path, name: str = "run") -> Told:
    return um.open_run(folder / name).event_list("action") if rank() == 0 else []


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


# -- checks -----------------------------------------------------------------------------------


def looks_back(history: Sequence[um.StepRecord]) -> list[um.Action]:
    """Goes by all that it is shown, also by what came before the checkpoint."""
    mean = sum(record["train/loss/total"] for record in history) / len(history)
    factor = 0.5 + 0.1 * len(history) + 0.01 * mean
    return [um.Action(kind="scale", values={"factor": factor}, targets=("*mlp*",))]


def goes_back(history: Sequence[um.StepRecord]) -> list[um.Action]:
    step = history[-1].step
    if step in (2, 4):
        return [um.Action(kind="snapshot")]
    if step == 6:
        return [um.Action(kind="roll_back", values={"steps_back": 0, "skip_steps": 1})]
    return []


WITH_MEMORY: list[Any] = [
    {"autoclip": {"percentile": 50, "warmup": 2}},
    {"zclip": {"warmup": 4, "z": 0.1}},
    {"annealed_noise": {"eta": 1.0e-4}},
    {"lr_boost": {"below": 1.0, "factor": 1.3, "longest": 2, "cooldown": 2}},
    {"adagc": {"warmup": 3, "relative": 0.9}},
    looks_back,
    goes_back,
]


def check_resuming_gives_the_same_weights_as_never_stopping(engine: str, folder: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "max_grad_norm": 0.0}
    once, whole = train(engine, folder / "once", WITH_MEMORY, more_policies=[looks_back], **saves)
    assert once.state.global_step == 8
    train(engine, folder / "twice", WITH_MEMORY, more_policies=[looks_back], **saves)
    place = str(folder / "twice/output/checkpoint-3")
    _, resumed = train(
        engine, folder / "twice", WITH_MEMORY, resume=place, more_policies=[looks_back], **saves
    )
    assert same(whole, resumed) == []
    if rank() == 0:
        every = [(a["step"], a["policy"], a["values"]) for a in actions(folder / "once")]
        again = [(a["step"], a["policy"], a["values"]) for a in actions(folder / "twice")]
        assert again[-len([e for e in every if e[0] > 3]) :] == [e for e in every if e[0] > 3]
        assert {e[1] for e in every} == {
            "autoclip", "zclip", "annealed_noise", "lr_boost", "adagc", "looks_back", "goes_back"
        }  # fmt: skip
        back = next(a for a in actions(folder / "once") if a["action"] == "roll_back")
        assert back["note"] == "rolled back to the weights after step 3"
        assert len(actions(folder / "once", "run-2")) == 8


def check_policies_without_a_saved_state_start_fresh_and_warn(engine: str, folder: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    train(engine, folder, [looks_back], **saves)
    if rank() == 0:
        (folder / "output/checkpoint-2/ulysses_policies_0.npz").unlink()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    train(engine, folder, [looks_back], resume=str(folder / "output/checkpoint-2"), **saves)
    if rank() == 0:
        (event,) = um.open_run(folder / "run").event_list("monitor")
        assert event["policies_anew"] == ["looks_back"]


def check_a_damaged_policy_state_is_refused_on_every_rank(engine: str, folder: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    train(engine, folder, [looks_back], **saves)
    if rank() == 0:
        (folder / "output/checkpoint-2/ulysses_policies_0.npz").write_bytes(b"junk")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    with pytest.raises(um.InputError, match="is not a state of policies"):
        train(engine, folder, [looks_back], resume=str(folder / "output/checkpoint-2"), **saves)


def saves_and_stops(history: Sequence[um.StepRecord]) -> list[um.Action]:
    step = history[-1].step
    if step == 2:
        return [um.Action(kind="save", reason="worth keeping")]
    return [um.Action(kind="stop", reason="good enough")] if step == 3 else []


def check_a_policy_saves_and_stops_the_training(engine: str, folder: Path) -> None:
    trainer, _ = train(engine, folder, [saves_and_stops])
    assert trainer.state.global_step == 3
    assert trainer.stopped == "saves_and_stops: good enough"
    if rank() == 0:
        assert [p.name for p in (folder / "output").glob("checkpoint-*")] == ["checkpoint-2"]
        run = um.open_run(folder / "run")
        assert run.info["status"] == "stopped"
        assert run.event_list("stop")[-1]["reason"] == "saves_and_stops: good enough"


def check_the_late_phase_counts_the_steps_of_an_epoch_run(engine: str, folder: Path) -> None:
    policies = [
        {"annealed_noise": {"late": "off", "late_start": 0.5}},
        {"lr_boost": {"below": 1e3, "factor": 2.0, "late": {"factor": 1.5}, "late_start": 0.75}},
    ]
    trainer, _ = train(
        engine, folder, policies, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=4
    )
    steps = trainer.state.max_steps
    assert steps in (4, 8)
    if rank() == 0:
        noise = [a["step"] for a in actions(folder) if a["policy"] == "annealed_noise"]
        factors = [a["values"]["factor"] for a in actions(folder) if a["policy"] == "lr_boost"]
        assert noise == list(range(1, steps // 2 + 1))
        assert factors == [2.0] * (steps * 3 // 4) + [1.5] * (steps // 4)
        used = um.open_run(folder / "run").metrics("optim/lr/0")["optim/lr/0"].tolist()
        logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
        assert used == pytest.approx([r * f for r, f in zip(logged, factors, strict=True)])


def check_a_step_that_is_not_finite_is_skipped(engine: str, folder: Path) -> None:
    from transformers import Trainer

    seen = []

    class Breaks(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(weights(self) if engine != "zero3" else {})
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    _, after = train(engine, folder, [looks_back], trainer_class=Breaks)
    if engine != "zero3":  # there the model holds no whole weights
        # Two micro-batches a step: those of step 4 see the weights of step 3.
        assert same(seen[4], seen[6]) == []
        assert same(seen[2], seen[4]) != []
    assert all(value.isfinite().all() for value in after.values())
    if rank() == 0:
        told = {a["step"]: a for a in actions(folder)}
        assert told[3]["policy"] == "nonfinite"
        assert told[3]["action"] == "skip"
        assert (
            "model.norm.weight" in um.open_run(folder / "run").event_list("action")[2]["targets"]
            or len(told[3]["targets"]) == 10
        )
        assert told[4]["policy"] == "looks_back"


def check_policies_that_cannot_work_are_refused_before_the_first_step(
    engine: str, folder: Path
) -> None:
    cases = [
        ([{"lora_balance": {}}], "lora/grad_ratio_B_A/total is not collected"),
        (["lr_boost", "spike_escalation"], "both set the learning rate"),
        (["warmup_cosine"], "so does the Trainer's linear schedule"),
    ]
    for i, (policies, message) in enumerate(cases):
        with pytest.raises(um.InputError, match=message):
            train(engine, folder / str(i), policies)
        forget_last_trainer()


def check_a_training_shorter_than_a_warm_up_runs_and_says_that_the_policy_will_not_act(
    engine: str, folder: Path
) -> None:
    trainer, _ = train(engine, folder, [{"zclip": {"warmup": 50}}])
    assert trainer.state.global_step == 4
    if rank() == 0:
        lines = (folder / "run/events.jsonl").read_text().splitlines()
        told = [event for event in map(json.loads, lines) if "left_out" in event]
        assert [event["policy"] for event in told] == ["zclip"]
        assert "it only observes for 50 steps" in told[0]["left_out"]


def check_presets_leave_out_policies_that_cannot_act(engine: str, folder: Path) -> None:
    for name in ("ulysses-pro", "ulysses-pro-2025-03", "adaptive"):
        trainer, _ = train(engine, folder / name, name)
        assert trainer.state.global_step == 4
        if rank() == 0:
            told = json.loads((folder / name / "run/events.jsonl").read_text().splitlines()[0])
            assert set(told["policies"].values()) == {"active"}


# -- how they run -----------------------------------------------------------------------------

CHECKS = {name: f for name, f in sorted(globals().items()) if name.startswith("check_")}
ENGINES = {1: ["plain"], 2: ["ddp", "zero2", "zero3"]}


def run_all(root: str, engines: list[str]) -> dict[str, str]:
    return run_checks(CHECKS, root, engines)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    root = str(tmp_path_factory.mktemp("policies"))
    return {n: spawn(run_all, n, args=[root, ENGINES[n]], timeout=280) for n in ENGINES}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("engine", ["plain", "ddp", "zero2", "zero3"])
def test_with(words: dict[int, list[dict[str, str]]], engine: str, name: str) -> None:
    for each in words[1 if engine == "plain" else 2]:
        assert each[f"{engine}-{name}"] == ""
