"""A defect of the monitor's inside a Trainer's training costs metrics, never the training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ulysses_monitor as um
from tests.support.hf_cases import build_trainer
from ulysses_monitor.common.errors import InputError, TrainingStoppedError
from ulysses_monitor.integrations import callback, patches
from ulysses_monitor.probes.capture import Capture
from ulysses_monitor.session.session import Session

SAVING = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    trainer = build_trainer("plain", tmp_path_factory.mktemp("bare"), **SAVING)
    trainer.train()
    return losses(trainer)


def watched(folder: Path, **more: Any) -> tuple[Any, um.MemorySink]:
    sink = um.MemorySink()
    settings = {key: more.pop(key) for key in ("policies",) if key in more}
    monitor = um.Monitor(folder / "run", tensorboard=False, sinks=[sink], **settings)
    trainer = build_trainer("plain", folder, **SAVING, **more)
    monitor.attach(trainer)
    return trainer, sink


def told(sink: um.MemorySink) -> list[tuple[str, str]]:
    return [(e.data["part"], e.data["state"]) for e in sink.events if "part" in e.data]


def breaks(*_: Any, **__: Any) -> Any:
    raise AttributeError("get_cp_size")


BROKEN: dict[str, tuple[Any, str, str]] = {
    "counting tokens": (patches, "row_tokens", "train/tokens_per_second/total"),
    "observing the loss": (Session, "observe", "train/loss/total"),
    "reading the gradients": (Capture, "read", "grad/norm/total"),
    "reading the optimizer's step": (Capture, "finish_step", "optim/update_ratio/total"),
    "on_step_end": (Session, "step_ends", "train/step_seconds/total"),
    "on_evaluate": (callback, "name_numbers", "eval/accuracy/total"),
    "on_log": (callback, "name_numbers", "train/kl/total"),
    "on_save": (Session, "policy_state", ""),
    "removing the patches": (callback, "undo_all", ""),
    "ending the run": (Session, "close", ""),
}


@pytest.mark.parametrize("part", BROKEN)
def test_what_raises_costs_its_metrics_and_is_an_event_once(
    part: str, bare: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, metric = BROKEN[part]
    trainer, sink = watched(tmp_path)
    original, once = getattr(owner, name), []

    def breaks_while_training(*args: Any, **kwargs: Any) -> Any:
        if part == "removing the patches" and (once or not args[0]):
            return original(*args, **kwargs)
        once.append(1)
        if part == "ending the run":
            original(*args, **kwargs)
        return breaks()

    monkeypatch.setattr(owner, name, breaks_while_training)
    trainer.train()
    assert once
    assert losses(trainer) == bare
    if part != "ending the run":  # its sinks were open till then, and nothing comes after
        assert (part, "failed") in told(sink)
        assert all(state == "failed" for _, state in told(sink))
        assert len(told(sink)) == len(set(told(sink)))
    assert not any(metric in record for record in sink.records)
    assert "get_batch_samples" not in vars(trainer)


def test_a_batch_that_cannot_be_read_costs_the_counts_of_its_step_only(
    bare: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, sink = watched(tmp_path)
    seen: list[int] = []

    def labels(original: Callable[..., Any], *args: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:  # the first micro-batch of step 2
            nested = torch.nested.nested_tensor(
                [torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged
            )
            return original({"labels": nested}, *args[1:])
        return original(*args)

    original = patches.label_tokens
    monkeypatch.setattr(patches, "label_tokens", lambda *args: labels(original, *args))
    trainer.train()
    assert losses(trainer) == bare
    steps = [r.step for r in sink.records if "train/loss_tokens/total" in r]
    speeds = [r.step for r in sink.records if "train/tokens_per_second/total" in r]
    assert steps == speeds
    assert steps in ([1, 3, 4], [1, 2, 3, 4])  # a torch that slices jagged tensors counts them
    assert len([r for r in sink.records if "train/loss/total" in r]) == 4


def test_a_trainer_without_its_parallel_sizes_is_watched(
    bare: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, sink = watched(tmp_path)
    original = type(trainer).get_cp_size

    def absent_for_us(trainer: Any) -> Any:
        is_ours = sys._getframe(1).f_code.co_filename == patches.__file__
        return breaks() if is_ours else original(trainer)

    monkeypatch.setattr(type(trainer), "get_cp_size", absent_for_us)
    trainer.train()
    assert losses(trainer) == bare
    assert told(sink) == [("counting tokens", "failed")]
    assert len([r for r in sink.records if "grad/norm/total" in r]) == 4


class Stops:
    """A policy that stops the training, or cannot act."""

    name = "stops"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def decide(self, history: Any) -> list[um.Action]:
        raise self.error


def test_a_stop_that_was_asked_for_passes(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, policies=[Stops(TrainingStoppedError("enough"))])
    with pytest.raises(TrainingStoppedError, match="enough"):
        trainer.train()


def test_a_policy_that_cannot_act_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = watched(tmp_path)

    def refuses(*_: Any) -> Any:
        raise InputError("policy stops: needs lora")

    monkeypatch.setattr("ulysses_monitor.steering.Steering.steer", refuses)
    with pytest.raises(InputError, match="needs lora"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_later_the_same_error_costs_only_the_policies(
    bare: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ulysses_monitor.steering import Steering

    trainer, sink = watched(tmp_path)
    original, calls = Steering.steer, []

    def refuses(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise InputError("policy stops: needs lora")
        return original(*args)

    monkeypatch.setattr(Steering, "steer", refuses)
    trainer.train()
    assert losses(trainer) == bare
    assert told(sink) == [("steering", "failed"), ("steering", "off")]
