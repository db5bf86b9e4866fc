"""Probes on request by name, as YAML configs and `Monitor` take them."""

from __future__ import annotations

from typing import Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.registry import Registry
from ulysses_monitor.probes.modules import ModuleProbes, ProbeMaker

__all__ = ["PROBES", "check_probes", "make_probes"]

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
