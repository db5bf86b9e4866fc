"""Opens the recording of a session: on rank 0 only, and with one answer for all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ulysses_monitor.common.environment import describe_environment
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.notice import notify
from ulysses_monitor.common.ranks import agree_or_raise, broadcast_bytes, rank, world_size
from ulysses_monitor.common.repository import describe_repository
from ulysses_monitor.engines import Engine
from ulysses_monitor.session.flops import numel
from ulysses_monitor.session.places import NUMBERED_AFTER, Place, claim
from ulysses_monitor.session.process_exit import Status
from ulysses_monitor.session.recording import NoRecording, Recorder, Recording
from ulysses_monitor.session.settings import MonitorSettings, Parts
from ulysses_monitor.steering import Steering
from ulysses_monitor.store import IfExists, is_locked

__all__ = [
    "Ended",
    "Training",
    "describe_model",
    "make_steering",
    "open_recorder",
    "restore_memory",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known of a training when its run opens.

    Attributes:
        step: optimizer steps already done; more than 0 continues the run directory.
        max_steps: optimizer steps of the whole training, None if unknown.
        info: further entries for run.json.
        abilities: of ``save`` and ``stop``, what the training does when `take_requests` asks.
        scheduler: kind of the learning rate's schedule, where it is known.
        no_rerun: why no step of it can be computed again, such as ``torch.compile``, if that is
            known.
        policy_state: what `Session.policy_state` returned at the checkpoint that is resumed.
        special_tokens: ids of the tokenizer's special tokens; empty if they are not known.
    """

    step: int = 0
    max_steps: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    abilities: Collection[str] = ()
    scheduler: str = ""
    policy_state: bytes | None = None
    no_rerun: str = ""
    special_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Ended:
    """What is kept of a session that ended; the session itself would keep model and optimizer."""

    run_dir: Path
    step: int
    stopped: str | None


def make_steering(
    engine: Engine, settings: MonitorSettings, parts: Parts, training: Training, guard: Guard
) -> Steering:
    """Makes what lets the policies of `parts` and people act on a training.

    Raises:
        InputError: policies contradict one another.
    """
    return Steering(
        engine,
        parts.policies,
        mode=settings.mode,
        seed=settings.seed,
        max_steps=training.max_steps,
        abilities=training.abilities,
        scheduler=training.scheduler,
        guard=guard,
    )


def restore_memory(steering: Steering, parts: Parts, training: Training) -> list[str]:
    """Gives policies what they remembered at the checkpoint; returns those that start anew.

    Raises:
        InputError: the state is damaged.
    """
    missing = [policy.name for policy in parts.policies] if training.step else []
    if training.policy_state is not None:
        missing = steering.load(training.policy_state, "checkpoint", training.step)
    if missing:
        logger.warning(
            "monitor: the checkpoint does not contain the memory of %s; starting without it",
            ", ".join(missing),
        )
    return missing


def open_recorder(
    place: Place,
    settings: MonitorSettings,
    parts: Parts,
    engine: Engine,
    training: Training,
    config: Mapping[str, Any],
    *,
    on_exit: Callable[[Status], None],
) -> tuple[Recorder, Path]:
    """Takes the run directory on rank 0; every rank calls it.

    Args:
        place: where to record.
        settings: how to record.
        parts: what `settings` made.
        engine: what is trained.
        training: what is known of the training.
        config: what the user configured, for run.json.
        on_exit: closes the session when the process ends.

    Returns:
        The recorder, and the run directory, which `claim` chooses.

    Raises:
        InputError: rank 0 cannot take the directory; raised on every rank.
    """
    recorder: Recorder = NoRecording()
    run_dir = place.run_dir
    error: Exception | None = None
    if rank() == 0:
        info = _describe(parts, engine, training, config)

        def take(path: Path, if_exists: IfExists) -> Recording:
            number = path.name.removeprefix(place.run_dir.name)
            mirror = settings.mirror and settings.mirror.rstrip("/") + number
            return Recording(
                path,
                if_exists,
                info | ({NUMBERED_AFTER: place.run_dir.name} if number else {}),
                sinks=parts.sinks,
                tensorboard=settings.tensorboard,
                mirror=mirror,
                on_exit=on_exit,
            )

        try:
            recorder = recording = claim(place, take)
            run_dir = recording.run_dir
        except OSError as e:
            error = InputError(f"run directory {place.run_dir}: {e.strerror or e}")
        except Exception as e:  # noqa: BLE001 - raised below, where no rank waits for another
            error = e
    elsewhere = InputError("monitor: rank 0 could not take the run directory; see its message")
    agree_or_raise(error, elsewhere, engine.device)
    if rank() == 0 and run_dir != place.run_dir:
        _tell_number(place.run_dir, run_dir)
    return recorder, Path(broadcast_bytes(str(run_dir).encode(), engine.device).decode())


def _tell_number(taken: Path, run_dir: Path) -> None:
    why = "is in use by a running training" if is_locked(taken) else "is taken"
    notify(f"{taken} {why}; recording to {run_dir}")


def _describe(
    parts: Parts, engine: Engine, training: Training, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the entries of run.json."""
    repository = describe_repository()
    return {
        **describe_environment(),
        **({"git": repository} if repository else {}),
        "engine": engine.name,
        "world_size": world_size(),
        "config": dict(config),
        "sinks": [f"{type(s).__module__}:{type(s).__qualname__}" for s in parts.sinks],
        "rules": [rule.name for rule in parts.rules],
        "max_steps": training.max_steps,
        **training.info,
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Returns class and parameter counts, for run.json."""
    model = getattr(model, "module", model)
    parameters = list(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": sum(map(numel, parameters)),
        "trainable_parameters": sum(numel(p) for p in parameters if p.requires_grad),
    }
