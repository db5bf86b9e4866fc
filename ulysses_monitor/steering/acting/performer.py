"""Performs a step's actions: on gradients, learning rates, the update, and the training itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ulysses_monitor.engines import Engine
from ulysses_monitor.policies import Outcome
from ulysses_monitor.records import Action
from ulysses_monitor.steering.acting.editor import GradientEditor
from ulysses_monitor.steering.acting.gate import UpdateGate
from ulysses_monitor.steering.acting.rates import RateFactors
from ulysses_monitor.steering.acting.snapshot import Snapshot

__all__ = ["MAX_FACTOR", "Performer", "rate_factors"]

MAX_FACTOR = 10.0
"""Largest factor on a learning rate, whoever asked for it."""

_MAX_SNAPSHOTS = 2
"""Snapshots kept in memory: the newest may be too young to go back to."""

_SKIPPED = "not done: the step is skipped"


class Performer:
    """Acts on an engine; every rank calls it with the same outcomes.

    Args:
        engine: what is trained.
        seed: seed of the noise.
        abilities: ``save`` and ``stop``, as far as the training can do them.

    Attributes:
        gate: around the optimizer's step.
        skip_until: last of the steps that are skipped after rolling back.
        edited_norm: norm of this step's gradients after actions edited them; None if none did.
    """

    def __init__(self, engine: Engine, seed: int, abilities: Collection[str] = ()) -> None:
        self._engine, self._abilities = engine, abilities
        self._editor = GradientEditor(engine, seed)
        self._rates = RateFactors(engine.optimizer)
        self.gate = UpdateGate(engine)
        self._snapshots: list[Snapshot] = []
        self.skip_until = 0
        self.edited_norm: float | None = None

    def perform(
        self,
        outcomes: Sequence[Outcome],
        step: int,
        factors: Mapping[int | None, float],
        norm: float | None = None,
    ) -> list[Outcome]:
        """Performs the active ones of `outcomes` at a step whose gradients are not clipped yet.

        Args:
            outcomes: what policies asked for, in their order.
            step: the optimizer step.
            factors: on learning rates, beside those that the actions ask for.
            norm: norm of all gradients as the engine computed them.

        Returns:
            The outcomes in the same order, the active ones with what was done.
        """
        if step <= self.skip_until:
            self.gate.skip()
        done = [self._prepare(each, step) if each.is_active else each for each in outcomes]
        if self.gate.is_closed:
            done = [
                each.with_note(_SKIPPED)
                if each.is_active and each.target in ("gradients", "rate")
                else each
                for each in done
            ]
        else:
            self._rates.apply(rate_factors([o.action for o in done if o.is_active], factors))
            done = self._edit(done, step)
        after = norm if self.edited_norm is None else self.edited_norm
        return [
            replace(each, norm_before=norm, norm_after=after) if each.is_active else each
            for each in done
        ]

    def _prepare(self, outcome: Outcome, step: int) -> Outcome:
        """Performs actions on the update; notes which others this training cannot perform."""
        action = outcome.action
        if outcome.target == "update":
            return outcome.with_note(self._change_update(action, step))
        if outcome.target == "training" and action.kind not in self._abilities:
            return outcome.with_note(f"not done: this training cannot {action.kind}")
        if outcome.target == "rate":
            return outcome.with_note(self._rate_note(action))
        return outcome

    def _edit(self, outcomes: list[Outcome], step: int) -> list[Outcome]:
        places = [i for i, o in enumerate(outcomes) if o.is_active and o.target == "gradients"]
        if not places:
            return outcomes
        effect = self._editor.apply([outcomes[i].action for i in places], step)
        self.edited_norm = effect.norm
        done = list(outcomes)
        for i, tensors in zip(places, effect.tensors, strict=True):
            note = "" if tensors else "not done: no trained parameter matches the targets"
            done[i] = replace(done[i], tensors=list(tensors.values()), note=note)
            if done[i].action.kind == "freeze":
                self.gate.freeze(tensors)
        return done

    def _rate_note(self, action: Action) -> str:
        groups = len(self._engine.optimizer.param_groups)
        group = action.values.get("group", 0)
        if group < groups:
            return ""
        return f"not done: parameter group {group:.0f} does not exist; the optimizer has {groups}"

    def _change_update(self, action: Action, step: int) -> str:
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
            return "there is no snapshot to roll back to: the step is skipped"
        old = [s for s in self._snapshots if step - s.step >= action.values["steps_back"]]
        chosen = old[-1] if old else self._snapshots[0]
        self._snapshots = [s for s in self._snapshots if s.step <= chosen.step]
        self.gate.roll_back(chosen)
        self.skip_until = step + int(action.values["skip_steps"])
        return f"rolled back to the weights after step {chosen.step}"

    @property
    def has_snapshots(self) -> bool:
        """Whether there is a snapshot to roll back to."""
        return bool(self._snapshots)

    def take_snapshot(self, step: int, *, replace_others: bool = False) -> None:
        """Keeps weights and optimizer state as they are after `step`.

        Args:
            step: the last step done.
            replace_others: drop all earlier snapshots.
        """
        kept = [] if replace_others else self._snapshots[1 - _MAX_SNAPSHOTS :]
        self._snapshots = [*kept, Snapshot.of(self._engine, step)]

    def end_step(self) -> None:
        """Ends what counted for one step: rates are the scheduler's again, the gate is open."""
        self._rates.restore()
        self.gate.reset()
        self.edited_norm = None


def rate_factors(
    actions: Sequence[Action], others: Mapping[int | None, float]
) -> dict[int | None, float]:
    """Returns factors on learning rates by parameter group; the key None means all groups.

    If several actions name one group, the first one wins. Factors of actions and `others` multiply,
    up to `MAX_FACTOR`.
    """
    factors: dict[int | None, float] = {}
    for action in actions:
        if action.kind == "lr_factor":
            group = action.values.get("group")
            factors.setdefault(None if group is None else int(group), action.values["factor"])
    for group, factor in others.items():
        factors[group] = factors.get(group, 1.0) * factor
    return {group: min(MAX_FACTOR, factor) for group, factor in factors.items()}
