"""How a training is watched: the settings of `Monitor`, of YAML's `monitor:` and of `attach`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ulysses_monitor.policies import Managed, check_policies, make_policies
from ulysses_monitor.records import Mode
from ulysses_monitor.rules import Rule, check_rules, make_rules
from ulysses_monitor.session.probe_specs import ProbeMaker, check_probes, make_probes
from ulysses_monitor.sinks import Sink, check_sinks, make_sinks
from ulysses_monitor.store import check_mirror

__all__ = ["MonitorSettings", "Parts", "WhenTaken", "signature_of"]

WhenTaken = Literal["new", "refuse", "resume", "overwrite"]
"""What to do if a directory holds a run: record beside it, refuse, continue it, replace it."""


class MonitorSettings(BaseModel):
    """How a training is watched and recorded.

    Sinks, rules, policies and probes are checked here and made by `make_parts`, so that a
    configuration can be checked without importing code of the user's.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    sinks: Any = []
    """Sinks beside the run store and TensorBoard: objects with `write`, `flush` and `close`, names
    such as ``csv``, import paths of classes, or a mapping of one of these to its settings."""
    rules: Any = "default"
    """Alert rules: ``default``, ``off``, the path of a YAML file, or a list of names, names with
    settings, import paths, objects with a `name` and `check(history)`, and functions."""
    policies: Any = []
    """What acts on a step before its gradients are clipped: a preset such as ``ulysses-pro``, the
    path of a YAML file, or a list of names with settings, objects with a `name` and
    `decide(history)`, and functions of the history that return `um.Action`s."""
    probes: Any = []
    """Probes beside those of every run: ``["modules"]`` reads activations, output gradients,
    attention logits and the load of experts at sampled steps."""
    mode: Mode = "active"
    """Of policies that have no mode of their own; in ``shadow`` they decide and touch nothing."""
    seed: int = 0
    """Seed of the policies' noise."""
    tensorboard: bool = True
    """Whether to write TensorBoard files."""
    mirror: str | None = None
    """A URL, such as s3://bucket/runs/demo, that gets a copy of the run while it is written."""
    sample_every: int = Field(default=10, ge=1)
    """Optimizer state, parameters, adapters, updates and the equality of replicas are read at steps
    1, 1 + N, 1 + 2N, ..."""
    rows: int = Field(default=256, ge=0)
    """Steps of which each rank keeps the fingerprints of its rows, in memory and in the run
    directory; ``off`` or 0 for none, and alerts then name no rows."""
    if_exists: WhenTaken = "new"
    """What to do if the directory holds a run already: ``new`` records to the first free of
    ``<run>-2``, ``<run>-3``, ..., ``refuse`` is an error, ``resume`` continues the run and
    ``overwrite`` replaces it. With ``new``, a training that resumes from a checkpoint continues
    its run."""

    @field_validator("mode", mode="before")
    @classmethod
    def _read_off(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # what YAML makes of off

    @field_validator("rows", mode="before")
    @classmethod
    def _read_no_rows(cls, rows: Any) -> Any:
        return 0 if rows is False or rows == "off" else rows

    @field_validator("sinks", mode="before")
    @classmethod
    def _check_sinks(cls, sinks: Any) -> Any:
        check_sinks(sinks)
        return sinks

    @field_validator("rules", mode="before")
    @classmethod
    def _check_rules(cls, rules: Any) -> Any:
        rules = list(rules) if isinstance(rules, Iterator) else rules
        rules = "off" if rules is False else rules  # what YAML makes of off
        check_rules(rules)
        return rules

    @field_validator("probes", mode="before")
    @classmethod
    def _check_probes(cls, probes: Any) -> Any:
        check_probes(probes)
        return probes

    @field_validator("policies", mode="before")
    @classmethod
    def _check_policies(cls, policies: Any) -> Any:
        check_policies(policies)
        return policies

    @field_validator("mirror")
    @classmethod
    def _check_mirror(cls, mirror: str | None) -> str | None:
        if mirror is not None:
            check_mirror(mirror)
        return mirror

    def make_parts(self) -> Parts:
        """Makes the sinks, rules and policies, and what makes probes.

        Raises:
            InputError: something of the user's cannot be imported, or is not what it should be.
        """
        policies = [] if self.mode == "off" else make_policies(self.policies)
        return Parts(
            make_sinks(self.sinks), make_rules(self.rules), policies, make_probes(self.probes)
        )


@dataclass(frozen=True)
class Parts:
    """What a session is made of beside its engine; one monitor uses the same for each training."""

    sinks: list[Sink]
    rules: list[Rule]
    policies: list[Managed]
    probes: list[ProbeMaker]


def signature_of(init: Callable[..., None]) -> inspect.Signature:
    """Returns the signature of a class whose ``**settings`` are those of `MonitorSettings`."""
    own = list(inspect.signature(init).parameters.values())[1:-1]
    settings = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.get_default(call_default_factory=True),
            annotation=field.annotation,
        )
        for name, field in MonitorSettings.model_fields.items()
    ]
    return inspect.Signature([*own, *settings])
