"""Probes on request by name, as YAML configs and `Monitor` take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import BeforeValidator

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.registry import Registry
from ulysses_monitor.common.settings import Text, check_fields, list_as_tuple

if TYPE_CHECKING:
    from ulysses_monitor.probes.modules import ModuleProbe, Surroundings

__all__ = ["PROBES", "ModuleProbes", "ProbeMaker", "check_probes", "make_probes"]


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
        from ulysses_monitor.probes.modules import ModuleProbe, Options

        return ModuleProbe(around, Options(self.modules, self.attention, self.gradients))


PROBES: Registry[ProbeMaker] = Registry(
    word="probe",
    plural="probes",
    known={"modules": ModuleProbes},
    protocol=ProbeMaker,
    needs="make(around)",
    takes_files=False,
)
"""The probes that are read on request only, because they cost more than the others."""


def make_probes(specs: Any) -> list[ProbeMaker]:
    """Makes what makes the probes of each training.

    Args:
        specs: a list, each entry ``"modules"`` or ``{"modules": settings}``.

    Raises:
        InputError: a name or a setting is wrong, or a name is given twice.
    """
    _check_twice(specs)
    return PROBES.make_all(specs)


def check_probes(specs: Any) -> None:
    """Checks what `make_probes` would make.

    Raises:
        InputError: a name or a setting is wrong.
    """
    _check_twice(specs)
    PROBES.check_all(specs)


def _check_twice(specs: Any) -> None:
    names = [found.name for spec, _ in PROBES.expand(specs) if (found := PROBES.parse(spec))]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"probes: {twice} is given twice; expected each probe once")
