"""Does what a step's actions say: to gradients, rates, the update, and the training itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ulysses_monitor.engines import Engine
from ulysses_monitor.records import KINDS, Action
from ulysses_monitor.steering.acting.editor import GradientEditor
from ulysses_monitor.steering.acting.gate import Snapshot, UpdateGate
from ulysses_monitor.steering.acting.rates import RateFactors

__all__ = ["MAX_FACTOR", "Done", "Performed", "Performer", "rate_factors"]

MAX_FACTOR = 10.0
"""Largest factor on a learning rate, whoever asked for it."""

_SNAPSHOTS = 2
"""That are kept in memory: one may be too young to go back to."""


@dataclass
class Done:
    """What became of one action.

    Attributes:
        tensors: names of the parameters whose gradients were edited, or that were frozen.
        note: what people should know, such as why nothing was done.
    """

    tensors: list[str] | None = None
    note: str = ""


@dataclass
class Performed:
    """What became of a step's actions.

    Attributes:
        done: of each action, in their order.
        norm: of the gradients after them, by which the engine clips; None where they were not
            edited.
        wants: ``save`` and ``stop``, which whoever trains must do.
    """

    done: list[Done] = field(default_factory=list)
    norm: float | None = None
    wants: set[str] = field(default_factory=set)


class Performer:
    """Acts on an engine; every rank calls it with the same actions.

    Args:
        engine: what is trained.
        seed: of noise.
        can: of ``save`` and ``stop`` what whoever trains does.

    Attributes:
        gate: around the optimizer's step.
        skip_until: last of the steps that are left out after going back.
    """

    def __init__(self, engine: Engine, seed: int, can: Collection[str] = ()) -> None:
        self._engine, self._can = engine, can
        self._editor = GradientEditor(engine, seed)
        self._rates = RateFactors(engine.optimizer)
        self.gate = UpdateGate(engine)
        self._snapshots: list[Snapshot] = []
        self.skip_until = 0

    def perform(
        self, actions: Sequence[Action], step: int, factors: Mapping[int | None, float]
    ) -> Performed:
        """Does `actions` at a step whose gradients are not clipped yet.

        Args:
            actions: in their order.
            step: the optimizer step.
            factors: on learning rates, beside those that the actions ask for.
        """
        performed = Performed([Done() for _ in actions])
        if step <= self.skip_until:
            self.gate.skip()
        for action, done in zip(actions, performed.done, strict=True):
            if KINDS[action.kind].on == "update":
                done.note = self._on_update(action, step)
            elif KINDS[action.kind].on == "training":
                if action.kind in self._can:
                    performed.wants.add(action.kind)
                else:
                    done.note = f"not done: this training cannot {action.kind}"
            elif action.kind == "lr_factor":
                done.note = self._rate_note(action)
        if self.gate.closed:
            for action, done in zip(actions, performed.done, strict=True):
                if KINDS[action.kind].on in ("gradients", "rate"):
                    done.note = "not done: the step is left out"
            return performed
        self._rates.apply(rate_factors(actions, factors))
        self._edit(actions, step, performed)
        return performed

    def _edit(self, actions: Sequence[Action], step: int, performed: Performed) -> None:
        edits = [i for i, action in enumerate(actions) if KINDS[action.kind].on == "gradients"]
        if not edits:
            return
        effect = self._editor.apply([actions[i] for i in edits], step)
        performed.norm = effect.norm
        for i, tensors in zip(edits, effect.tensors, strict=True):
            performed.done[i].tensors = list(tensors.values())
            if not tensors:
                performed.done[i].note = "not done: no trained parameter has such a name"
            if actions[i].kind == "freeze":
                self.gate.freeze(tensors)

    def _rate_note(self, action: Action) -> str:
        groups = len(self._engine.optimizer.param_groups)
        group = action.values.get("group", 0)
        return "" if group < groups else f"not done: no such parameter group; there are {groups}"

    def _on_update(self, action: Action, step: int) -> str:
        if action.kind == "skip":
            self.gate.skip()
        elif action.kind == "snapshot":
            self.take_snapshot(step - 1)
        elif action.kind == "roll_back":
            return self._roll_back(action, step)
        return ""

    def _roll_back(self, action: Action, step: int) -> str:
        if not self._snapshots:
            self.gate.skip()
            return "there is no snapshot to go back to: the step is left out"
        old = [s for s in self._snapshots if step - s.step >= action.values["steps_back"]]
        chosen = old[-1] if old else self._snapshots[0]
        self._snapshots = [s for s in self._snapshots if s.step <= chosen.step]
        self.gate.roll_back(chosen)
        self.skip_until = step + int(action.values["skip_steps"])
        return f"back to the weights after step {chosen.step}"

    @property
    def has_snapshots(self) -> bool:
        """Whether there is one to go back to."""
        return bool(self._snapshots)

    def take_snapshot(self, step: int, *, only: bool = False) -> None:
        """Keeps weights and state as they are after `step`.

        Args:
            step: the last step done.
            only: whether it takes the place of all others.
        """
        kept = [] if only else self._snapshots[1 - _SNAPSHOTS :]
        self._snapshots = [*kept, Snapshot.of(self._engine, step)]

    def stepped(self) -> None:
        """The optimizer's step is over: rates are the scheduler's again, the gate is open."""
        self._rates.restore()
        self.gate.opened()


def rate_factors(
    actions: Sequence[Action], others: Mapping[int | None, float]
) -> dict[int | None, float]:
    """Factors on learning rates by group, None for all; they multiply, up to `MAX_FACTOR`.

    Of several actions on one group the first counts.
    """
    factors: dict[int | None, float] = {}
    for action in actions:
        if action.kind == "lr_factor":
            group = action.values.get("group")
            factors.setdefault(None if group is None else int(group), action.values["factor"])
    for group, factor in others.items():
        factors[group] = factors.get(group, 1.0) * factor
    return {group: min(MAX_FACTOR, factor) for group, factor in factors.items()}
