"""Asks policies at each step, on every rank alike, does what they say, and obeys people."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.engines import Engine
from ulysses_monitor.policies import Decision, Managed, PolicySet
from ulysses_monitor.policies.base import MAX_STEPS
from ulysses_monitor.policies.policy_set import is_sound
from ulysses_monitor.records import Action, Alert, Event, Mode, Schema, StepRecord
from ulysses_monitor.records.command import Command
from ulysses_monitor.steering.acting import Performer, UpdateGate
from ulysses_monitor.steering.agreement import Agreement
from ulysses_monitor.steering.checks import check_conflicts, fitting
from ulysses_monitor.steering.orders import Orders
from ulysses_monitor.steering.state import from_bytes, to_bytes
from ulysses_monitor.steering.told import Told

__all__ = ["Steered", "Steering", "leave_out"]

logger = logging.getLogger(__name__)


@dataclass
class Steered:
    """What a step's steering gave.

    Attributes:
        events: for the run's record, alike on all ranks.
        norm: of the gradients after it, where they were edited.
    """

    events: list[Event] = field(default_factory=list)
    norm: float | None = None


class Steering:
    """Policies and people at the wheel of one training.

    Args:
        engine: what is trained.
        policies: asked in this order, which is also that of their actions.
        mode: of those that have none of their own.
        seed: of noise.
        max_steps: of the training, where it is known.
        can: of ``save`` and ``stop`` what whoever trains can do.
        scheduler: the Trainer's, where it has one.

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
        can: Collection[str] = (),
        scheduler: str = "",
    ) -> None:
        self._engine, self._mode = engine, mode
        self._given = list(policies)
        check_conflicts([p for p in self._given if (p.mode or mode) != "off"], scheduler)
        self._max_steps, self._can = max_steps, can
        self._policies = PolicySet(self._given, mode)
        self._checked = not self._given
        self._performer = Performer(engine, seed, can)
        self._agreement = Agreement()
        self._orders = Orders(engine.device)
        self._factors: dict[int | None, float] = {}
        self._schemas: dict[Schema, Schema] = {}
        self._off = False
        self.wants: dict[str, str] = {}

    # -- one step ------------------------------------------------------------------------------

    @property
    def modes(self) -> dict[str, Mode]:
        """The mode of each policy."""
        return dict(self._policies.modes)

    @property
    def gate(self) -> UpdateGate:
        """The `UpdateGate` around the optimizer's step."""
        return self._performer.gate

    def listen(self, run_dir: Path) -> None:
        """Obeys what is sent to the run directory from now on; rank 0 alone."""
        self._orders.open(run_dir)

    def sends(self) -> dict[str, float]:
        """This rank's numbers for the step's vector."""
        return self._orders.sends() | (self._agreement.sends() if self._given else {})

    def _check(self, metrics: Collection[str]) -> None:
        """Before the first step: leaves out of presets what cannot act in this run."""
        self._checked = True
        asked = [p for p in self._given if self._policies.modes[p.name] != "off"]
        fit = {id(p) for p in fitting(asked, metrics, self._max_steps, self._can)}
        for policy in asked:
            if id(policy) not in fit:
                self._policies.leave_out(policy.name)

    def steer(
        self,
        look: Callable[[], StepRecord],
        sums: Mapping[str, float],
        metrics: Callable[[], Collection[str]],
    ) -> Steered:
        """Decides on a step whose gradients are not clipped yet, and acts.

        Args:
            look: makes the record of what is known of the step, alike on all ranks.
            sums: what `sends` gave, over all ranks.
            metrics: names of all that is collected; asked before the first step.

        Raises:
            InputError: before the first step, a policy that the user named cannot act.
        """
        steered = Steered()
        command = self._orders.receive(sums)
        problems = self._orders.problems()
        if not (self._given or self._factors or command or problems):
            return steered
        record = look()
        steered.events += [_event(record.step, {"refused": each}) for each in problems]
        if command is not None:
            steered.events.append(self._obey(command, record.step))
        if not self._checked:
            self._check({*metrics(), *record.schema.names})
        if self._off:
            return steered
        if self._given and (wrong := self._agreement.verdict(sums)):
            steered.events.append(self._give_up(record.step, wrong))
            return steered
        decisions = self._decide(record)
        self._agreement.note(decisions)
        try:
            told, steered.norm = self._act(decisions, record)
        except Exception:
            self._agreement.note_failure()
            logger.exception("monitor: could not act at step %d; policies go off", record.step)
            return steered
        steered.events += [each.to_event(record.step) for each in told]
        return steered

    def _decide(self, record: StepRecord) -> list[Decision]:
        if not self._policies:
            return []
        seen = self._as_policies_see(record)
        if is_sound(seen):
            return self._policies.decide(seen)
        return [Decision("nonfinite", leave_out(seen), not self._policies.acts)]

    def _as_policies_see(self, record: StepRecord) -> StepRecord:
        """As the run store keeps it, so that a replay decides as it was decided here."""
        with np.errstate(over="ignore"):
            values = record.values.astype(np.float32).astype(np.float64)
        schema = record.schema
        if self._max_steps is not None:
            values = np.append(values, float(self._max_steps))
            if schema not in self._schemas:
                self._schemas[schema] = Schema((*schema.names, MAX_STEPS))
            schema = self._schemas[schema]
        return StepRecord(record.step, record.time, schema, values)

    def _act(
        self, decisions: Sequence[Decision], record: StepRecord
    ) -> tuple[list[Told], float | None]:
        active = [d for d in decisions if not d.shadow]
        performed = self._performer.perform([d.action for d in active], record.step, self._factors)
        for decision in active:
            if decision.action.kind in performed.wants:
                reason = decision.action.reason or decision.action.kind
                self.wants[decision.action.kind] = f"{decision.policy}: {reason}"
        before = record.get("grad/norm/total")
        after = before if performed.norm is None else performed.norm
        done = dict(zip(map(id, active), performed.done, strict=True))
        told = [
            Told(d, done=done[id(d)], norm_before=before, norm=after) if id(d) in done else Told(d)
            for d in decisions
        ]
        return told, performed.norm

    def _give_up(self, step: int, wrong: str) -> Event:
        self._off = True
        self._factors.clear()
        logger.error("monitor: step %d: %s; policies are off", step, wrong)
        alert = Alert(
            rule="policies_disagree",
            step=step,
            metric="policies",
            value=1.0,
            threshold=0.0,
            message=f"Step {step}: {wrong} at the step before: policies are off, and the replicas "
            "may differ.",
            hint="Go back to the last checkpoint; look for a policy that goes by more than the "
            "history.",
            severity="critical",
        )
        return alert.to_event(time.time())

    def turn_off(self) -> None:
        """Stops acting, on this rank; the others hear of it in the next step's vector."""
        self._policies.set_mode("*", "off")
        self._agreement.note_failure()

    def ends(self) -> None:
        """Ends what counts for a step, where it was not done."""
        self._performer.stepped()

    def stepped(self) -> bool:
        """Ends what counted for the step alone.

        Returns:
            Whether the optimizer's update was left out.
        """
        left_out = self._performer.gate.closed
        if self._performer.gate.failed:
            self._agreement.note_failure()
        self._performer.stepped()
        return left_out

    # -- people --------------------------------------------------------------------------------

    def _obey(self, command: Command, step: int) -> Event:
        about = {
            "id": command.id,
            "who": command.who,
            "why": command.why,
            "command": command.describe(),
        }
        try:
            self._do(command)
            about["result"] = command.describe()
        except InputError as error:
            about["refused"] = str(error)
        return _event(step, about)

    def _do(self, command: Command) -> None:
        groups = len(self._engine.optimizer.param_groups)
        factors = {None if g == "*" else int(g): f for g, f in command.lr_factors.items()}
        for group in factors:
            if group is not None and group >= groups:
                raise InputError(
                    f"lr_factor.{group}: no such parameter group; it has {groups}, from 0"
                )
        for name, wanted in (("save", command.save), ("stop", command.stop)):
            if wanted and name not in self._can:
                raise InputError(f"{name}: this training cannot; give watch(..., save=)")
        before = dict(self._policies.modes)
        try:
            for name, mode in command.modes.items():
                self._policies.set_mode(name, mode)
            on = [p for p in self._given if self._policies.modes.get(p.name, "off") != "off"]
            check_conflicts(on)
        except InputError:
            self._policies.modes = before
            raise
        if None in factors:
            self._factors.clear()
        self._factors |= factors
        self._factors = {group: f for group, f in self._factors.items() if f != 1.0}
        for name, wanted in (("save", command.save), ("stop", command.stop)):
            if wanted:
                self.wants[name] = f"{command.who}: {command.why or name}"

    # -- what travels with a checkpoint ----------------------------------------------------------

    def saved(self, step: int) -> None:
        """A checkpoint of `step` was written: nobody goes back behind it.

        A training that resumes from it has no older snapshots, and must do the same.
        """
        if self._performer.has_snapshots:
            self._performer.take_snapshot(step, only=True)

    def to_bytes(self) -> bytes:
        """All that a training that resumes must know."""
        state = {
            "policies": self._policies.state_dict(),
            "factors": [[group, factor] for group, factor in self._factors.items()],
            "skip_until": self._performer.skip_until,
            "snapshots": self._performer.has_snapshots,
            "off": self._off,
        }
        return to_bytes(state, self._policies.history_arrays())

    def load(self, data: bytes, where: str, step: int) -> list[str]:
        """Takes `to_bytes` back.

        Args:
            data: what it gave.
            where: for messages.
            step: the step of the checkpoint, whose weights and state are loaded.

        Returns:
            Names of the policies that it says nothing of, which begin anew.

        Raises:
            InputError: it is damaged.
        """
        state, history = from_bytes(data, where)
        try:
            anew = self._policies.load(state["policies"], history)
            self._factors = {group: float(factor) for group, factor in state["factors"]}
            self._performer.skip_until = int(state["skip_until"])
            self._off = bool(state["off"])
            if state["snapshots"]:
                self._performer.take_snapshot(step, only=True)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: holds no state of policies: {error!r}") from None
        return anew


def _event(step: int, about: Mapping[str, str]) -> Event:
    return Event(kind="control", step=step, time=time.time(), data=about)


def leave_out(record: StepRecord) -> Action:
    """The answer to a step that is not finite, which names the tensors."""
    prefix = "grad/nonfinite/param/"
    bad = {n: record[n] for n in record.schema.match(f"{prefix}*") if record[n] > 0}
    loss = record.get("train/loss/total", 0.0)
    where = f"{len(bad)} gradients are NaN or Inf" if bad else f"the loss is {loss}"
    names = tuple(name.removeprefix(prefix) for name in bad) or ("*",)
    read = dict(list(bad.items())[:3])
    if not math.isfinite(loss):
        read["train/loss/total"] = loss
    return Action(kind="skip", targets=names, reason=f"not finite: {where}", read=read)
