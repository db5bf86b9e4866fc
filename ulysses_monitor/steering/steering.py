"""Asks policies at each step, on every rank alike, performs their actions, and obeys people."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.guard import Guard
from ulysses_monitor.common.ranks import rank
from ulysses_monitor.engines import Engine
from ulysses_monitor.policies import (
    Managed,
    Outcome,
    PolicySet,
    check_conflicts,
    fit_policies,
    policy_view,
)
from ulysses_monitor.records import Event, Mode, StepRecord
from ulysses_monitor.records.command import Command
from ulysses_monitor.steering.acting import Performer, UpdateGate
from ulysses_monitor.steering.agreement import Agreement, disagreement_alert
from ulysses_monitor.steering.inbox import CommandInbox, control_event, obey
from ulysses_monitor.steering.state import from_bytes, to_bytes

__all__ = ["Steering"]

logger = logging.getLogger(__name__)


class Steering:
    """Lets policies and people act on one training.

    Args:
        engine: what is trained.
        policies: asked in this order, which is also the order of their actions.
        mode: of policies that have no mode of their own.
        seed: seed of the noise.
        max_steps: optimizer steps of the whole training, None if unknown.
        abilities: ``save`` and ``stop``, as far as the training can do them.
        scheduler: kind of the learning rate's schedule, where it is known.
        guard: calls the policies.

    Attributes:
        inbox: the commands of people and alerts.
        requests: ``save`` and ``stop`` that were asked for, and by whom and why.

    Raises:
        InputError: policies contradict one another.
    """

    def __init__(
        self,
        engine: Engine,
        policies: Sequence[Managed],
        *,
        mode: Mode,
        seed: int,
        max_steps: int | None = None,
        abilities: Collection[str] = (),
        scheduler: str = "",
        guard: Guard | None = None,
    ) -> None:
        self._engine = engine
        self._policies = PolicySet(policies, mode, guard)
        check_conflicts(self._policies.enabled, scheduler)
        self._max_steps, self._abilities = max_steps, abilities
        self._has_policies = bool(policies)
        self._is_fitted = not policies
        self._performer = Performer(engine, seed, abilities)
        self._agreement = Agreement()
        self.inbox = CommandInbox(engine.device)
        self._factors: dict[int | None, float] = {}
        self._is_off = False
        self.requests: dict[str, str] = {}

    # -- one step ------------------------------------------------------------------------------

    @property
    def modes(self) -> dict[str, Mode]:
        """The mode of each policy."""
        return dict(self._policies.modes)

    @property
    def gate(self) -> UpdateGate:
        """The gate around the optimizer's step."""
        return self._performer.gate

    @property
    def has_state(self) -> bool:
        """Whether there is anything to keep with a checkpoint."""
        return self._has_policies or bool(self._factors)

    @property
    def edited_norm(self) -> float | None:
        """Norm of this step's gradients after policies edited them; None if they did not."""
        return self._performer.edited_norm

    def listen(self, run_dir: Path) -> None:
        """Obeys commands in the run directory from now on; called on rank 0 only."""
        self.inbox.open(run_dir)

    def collect_sums(self) -> dict[str, float]:
        """Returns this rank's numbers for the step's vector, to be summed over ranks."""
        sums = self.inbox.collect_sums()
        return sums | self._agreement.collect_sums() if self._has_policies else sums

    def steer(
        self,
        make_record: Callable[[], StepRecord],
        sums: Mapping[str, float],
        metrics: Callable[[], Collection[str]],
    ) -> list[Event]:
        """Decides on a step whose gradients are not clipped yet, and acts.

        Args:
            make_record: makes the record of what is known of the step, the same on all ranks.
            sums: `collect_sums` over all ranks.
            metrics: returns the names of all metrics the run collects; called before the first
                step.

        Returns:
            Events for the run, the same on all ranks.

        Raises:
            InputError: before the first step, a policy that the user named cannot act.
        """
        command = self.inbox.receive(sums)
        problems = self.inbox.problems()
        if not (self._has_policies or self._factors or command or problems):
            return []
        record = make_record()
        events = [control_event(record.step, {"refused": each}) for each in problems]
        if command is not None:
            events.append(obey(command, self._apply, record.step))
        if not self._is_fitted:
            events += self._fit({*metrics(), *record.schema.names}, record.step)
        if self._is_off:
            return events
        if self._has_policies and (difference := self._agreement.find_difference(sums)):
            return [*events, self._give_up(record.step, difference)]
        outcomes = self._policies.decide(policy_view(record, self._max_steps))
        self._agreement.note(outcomes)
        try:
            outcomes = self._act(outcomes, record)
        except Exception:
            self._agreement.note_failure()
            logger.exception("monitor: could not act at step %d; policies will be off", record.step)
            return events
        now = time.time()
        return [*events, *(outcome.to_event(record.step, now) for outcome in outcomes)]

    def _fit(self, metrics: Collection[str], step: int) -> list[Event]:
        """Before the first step: leaves out what cannot act in this run.

        Returns:
            An event for each policy that the user named and that is left out.
        """
        self._is_fitted = True
        named = {policy.name for policy in self._policies.enabled if not policy.preset}
        fit = fit_policies(self._policies.enabled, metrics, self._max_steps, self._abilities)
        self._policies.leave_out(fit.left_out)
        if rank() == 0:
            for name, reason in fit.left_out.items():
                level = logging.WARNING if name in named else logging.INFO
                logger.log(level, "monitor: policy %s is left out: %s", name, reason)
        return [
            Event(kind="monitor", step=step, time=time.time(), data={"policy": n, "left_out": r})
            for n, r in fit.left_out.items()
            if n in named
        ]

    def _act(self, outcomes: Sequence[Outcome], record: StepRecord) -> list[Outcome]:
        norm = record.get("grad/norm/total")
        done = self._performer.perform(outcomes, record.step, self._factors, norm)
        for outcome in done:
            action = outcome.action
            if outcome.is_active and outcome.target == "training" and not outcome.note:
                self.requests[action.kind] = f"{outcome.policy}: {action.reason or action.kind}"
        return done

    def _give_up(self, step: int, difference: str) -> Event:
        self._is_off = True
        self._factors.clear()
        logger.error("monitor: step %d: %s; policies are off", step, difference)
        return disagreement_alert(step, difference).to_event(time.time())

    def turn_off(self) -> None:
        """Stops acting on this rank; the other ranks learn of it in the next step's vector."""
        self._policies.set_mode("*", "off")
        self._agreement.note_failure()

    def end_step(self) -> bool:
        """Ends what counted for this step only, also where the step was not done.

        Returns:
            Whether the optimizer's update was skipped.
        """
        was_skipped = self._performer.gate.is_closed
        if self._performer.gate.has_failed:
            self._agreement.note_failure()
        self._performer.end_step()
        return was_skipped

    # -- people --------------------------------------------------------------------------------

    def _apply(self, command: Command) -> None:
        """Does all that a command asks, or nothing of it.

        Raises:
            InputError: some of it cannot be done.
        """
        factors = {None if g == "*" else int(g): f for g, f in command.lr_factors.items()}
        self._check_groups(factors)
        asked = [name for name in ("save", "stop") if getattr(command, name)]
        for name in asked:
            if name not in self._abilities:
                raise InputError(f"{name}: this training cannot {name}; give watch(..., save=)")
        self._set_modes(command.modes)
        if None in factors:
            self._factors.clear()
        self._factors |= factors
        self._factors = {group: f for group, f in self._factors.items() if f != 1.0}
        for name in asked:
            self.requests[name] = f"{command.who}: {command.why or name}"

    def _check_groups(self, factors: Mapping[int | None, float]) -> None:
        groups = len(self._engine.optimizer.param_groups)
        for group in factors:
            if group is not None and group >= groups:
                raise InputError(
                    f"lr_factor.{group}: parameter group {group} does not exist; allowed: 0 to "
                    f"{groups - 1}"
                )

    def _set_modes(self, modes: Mapping[str, Mode]) -> None:
        before = dict(self._policies.modes)
        try:
            for name, mode in modes.items():
                self._policies.set_mode(name, mode)
            check_conflicts(self._policies.enabled)
        except InputError:
            self._policies.modes = before
            raise

    # -- checkpoints -----------------------------------------------------------------------------

    def note_checkpoint(self, step: int) -> None:
        """Notes that a checkpoint of `step` was written: no roll-back goes behind it.

        A training that resumes from it has no older snapshots and must decide the same.
        """
        if self._performer.has_snapshots:
            self._performer.take_snapshot(step, replace_others=True)

    def to_bytes(self) -> bytes:
        """Returns all that a training needs to resume."""
        state = {
            "policies": self._policies.state_dict(),
            "factors": [[group, factor] for group, factor in self._factors.items()],
            "skip_until": self._performer.skip_until,
            "snapshots": self._performer.has_snapshots,
            "off": self._is_off,
        }
        return to_bytes(state, self._policies.history_arrays())

    def load(self, data: bytes, where: str, step: int) -> list[str]:
        """Restores what `to_bytes` returned.

        Args:
            data: what it returned.
            where: the source of `data`, for messages.
            step: the step of the checkpoint, whose weights and optimizer state are loaded.

        Returns:
            Names of policies that the state does not contain; they start without a memory.

        Raises:
            InputError: `data` is damaged.
        """
        state, history = from_bytes(data, where)
        try:
            missing = self._policies.load(state["policies"], history)
            self._factors = {group: float(factor) for group, factor in state["factors"]}
            self._performer.skip_until = int(state["skip_until"])
            self._is_off = bool(state["off"])
            if state["snapshots"]:
                self._performer.take_snapshot(step, replace_others=True)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: is not a state of policies: {error!r}") from None
        return missing
