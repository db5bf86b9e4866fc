"""What a user says about the module probe, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

from pydantic import BeforeValidator

from ulysses_monitor.common.settings import Text, check_fields, list_as_tuple
from ulysses_monitor.probes.modules.probe import ModuleProbe, Options, Surroundings

__all__ = ["ModuleProbes", "ProbeMaker"]


@runtime_checkable
class ProbeMaker(Protocol):
    """Makes a probe on request for each training."""

    def make(self, around: Surroundings) -> ModuleProbe:
        """Returns the probe of a training; every rank calls it."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModuleProbes:
    """Reads what each block of a model gives and gets, at sampled steps.

    Raises:
        InputError: a setting is wrong.
    """

    modules: Annotated[tuple[Text, ...], BeforeValidator(list_as_tuple)] = ()
    """Names of further modules, as patterns, such as ``*.mlp``; a block is always read."""
    attention: bool = True
    """Whether to compute attention's largest logits, which takes a product of q and k again."""
    gradients: bool = True
    """Whether to read the gradients of what the modules give."""

    def __post_init__(self) -> None:
        check_fields("probe modules", self)

    def make(self, around: Surroundings) -> ModuleProbe:
        """See `ProbeMaker.make`."""
        return ModuleProbe(around, Options(self.modules, self.attention, self.gradients))
