"""Policies by name, as YAML configs and `Monitor` take them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.expectations import Expected
from ulysses_monitor.common.registry import Named, Registry, distinct_names
from ulysses_monitor.common.settings import check_settings, read_numbers
from ulysses_monitor.common.yaml_lists import parse_list
from ulysses_monitor.policies.base import BuiltinPolicy, Decide, Policy
from ulysses_monitor.policies.clipping import AutoClip, ThresholdClipping, ZClip
from ulysses_monitor.policies.escalation import SpikeEscalation
from ulysses_monitor.policies.lora import LoraBalance
from ulysses_monitor.policies.managed import LATE_START, Managed
from ulysses_monitor.policies.noise import AnnealedNoise, GradientNoise
from ulysses_monitor.policies.outliers import SkipOutliers
from ulysses_monitor.policies.rescue import LiftVanishing
from ulysses_monitor.policies.schedules import FreezeSchedule, WarmupCosine
from ulysses_monitor.policies.small_gradients import (
    Centralization,
    LearningRateBoost,
    SmallGradientScaling,
)
from ulysses_monitor.policies.tensor_clipping import AGC, AdaGC
from ulysses_monitor.records import Mode

__all__ = ["POLICIES", "PRESETS", "check_policies", "make_policies"]

POLICIES: Mapping[str, type[BuiltinPolicy]] = {
    "adagc": AdaGC,
    "agc": AGC,
    "annealed_noise": AnnealedNoise,
    "autoclip": AutoClip,
    "centralize": Centralization,
    "clip_threshold": ThresholdClipping,
    "freeze": FreezeSchedule,
    "gradient_noise": GradientNoise,
    "lift_vanishing": LiftVanishing,
    "lora_balance": LoraBalance,
    "lr_boost": LearningRateBoost,
    "scale_small": SmallGradientScaling,
    "skip_outliers": SkipOutliers,
    "spike_escalation": SpikeEscalation,
    "warmup_cosine": WarmupCosine,
    "zclip": ZClip,
}
"""The project's own policies."""

PRESETS = ("adaptive", "ulysses-pro", "ulysses-pro-2025-03")
"""Sets of policies that come with the package, a YAML file each."""


def make_policies(specs: Any) -> list[Managed]:
    """Makes policies from what a user names them by, and gives each a name of its own.

    Args:
        specs: the name of a preset, the path of a YAML file with a list under ``policies``, or a
            list. Each entry of a list is a policy; a function of the history; the name of a policy
            or of a preset; an import path, ``package.module:name``; or a mapping of one of these
            names to settings, such as ``{"zclip": {"z": 3.0}}``. Every policy has the settings
            `name`, `mode` (off, shadow, active), `late` (settings that differ late in the training,
            or off) and `late_start` (share of all steps, 0.9).

    Raises:
        InputError: a name, a setting or an object is wrong.
    """
    return _number([_manage(spec, preset) for spec, preset in _REGISTRY.expand(specs)])


def check_policies(specs: Any) -> None:
    """Checks what `make_policies` would make, without importing what is the user's.

    Raises:
        InputError: a name, a setting or the form of an import path is wrong.
    """
    for spec, preset in _REGISTRY.expand(specs):
        named = _REGISTRY.parse(spec)
        if named is None or named.name in POLICIES:
            _manage(spec, preset)
        else:
            _split(named)


def _read_preset(name: str) -> Sequence[Any]:
    file = resources.files("ulysses_monitor.policies") / "presets" / f"{name}.yaml"
    return parse_list(file.read_text(encoding="utf-8"), "policies", name)


@dataclass(frozen=True)
class _Function:
    """A function of the history as a policy."""

    name: str
    decide: Decide


# -- settings that every policy has -----------------------------------------------------------


def _check_name(name: str) -> str:
    if not name or not name.isprintable() or "=" in name or "*" in name:
        raise ValueError("not a name")
    return name


def _off_is_a_word(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads off as false


@dataclass(frozen=True, kw_only=True)
class _Common:
    """Settings that every policy has beside its own; see `Managed`."""

    name: Annotated[str, AfterValidator(_check_name), Expected("text without = and *")] = ""
    mode: Annotated[Mode | None, BeforeValidator(_off_is_a_word)] = None
    late: Annotated[Any, BeforeValidator(_off_is_a_word)] = None
    late_start: Annotated[float, Field(gt=0, le=0.999999)] = LATE_START


_COMMON = tuple(field.name for field in dataclasses.fields(_Common))

_REGISTRY: Registry[Policy] = Registry(
    word="policy",
    plural="policies",
    known=POLICIES,
    protocol=Policy,
    needs="name and decide(history)",
    wrap=_Function,
    presets={name: functools.partial(_read_preset, name) for name in PRESETS},
    common=_COMMON,
)


def _split(named: Named) -> tuple[_Common, dict[str, Any]]:
    """Separates the settings that every policy has, checked, from the policy's own."""
    given = {key: value for key, value in named.settings.items() if key in _COMMON}
    own = {key: value for key, value in named.settings.items() if key not in _COMMON}
    where = f"policy {named.name}"
    common = _Common(**check_settings(where, _Common, read_numbers(_Common, given)))
    may_differ = named.name in POLICIES and isinstance(common.late, Mapping) and common.late
    if not (common.late in (None, "off") or may_differ):
        expected = "settings that differ, or off" if named.name in POLICIES else "off"
        raise InputError(f"{where}: late is {common.late!r}; expected {expected}")
    if common.late is None and "late_start" in given:
        raise InputError(f"{where}: late_start is given without late; add late, or remove it")
    return common, own


# -- policies ---------------------------------------------------------------------------------


def _manage(spec: Any, preset: str) -> Managed:
    if isinstance(spec, Managed):
        return spec
    named = _REGISTRY.parse(spec)
    if named is None:
        policy = _with_name(_REGISTRY.accept(spec))
        name = str(policy.name)
        _split(Named(name, {"name": name}))
        return Managed(name=name, policy=policy, preset=preset)
    common, own = _split(named)
    policy = _with_name(_build(named.name, own))
    return Managed(
        name=common.name or str(policy.name),
        policy=policy,
        mode=common.mode,
        late=_late(named.name, own, common.late),
        late_start=common.late_start,
        preset=preset,
    )


def _build(name: str, settings: Mapping[str, Any]) -> Policy:
    own_name = {"name": name} if name in POLICIES else {}
    return _REGISTRY.build(Named(name, {**settings, **own_name}))


def _late(
    name: str, settings: Mapping[str, Any], late: Any
) -> BuiltinPolicy | Literal["off"] | None:
    if not isinstance(late, Mapping):
        return "off" if late == "off" else None
    changed = {str(key): value for key, value in late.items()}
    if common := [key for key in changed if key in _COMMON]:
        raise InputError(
            f"policy {name}: late has the setting {common[0]!r}; expected settings of {name} alone"
        )
    policy = _build(name, {**settings, **changed})
    assert isinstance(policy, BuiltinPolicy)  # noqa: S101 - only these may have settings late
    return policy


def _with_name(policy: Policy) -> Policy:
    """Gives one of the project's own a name, and a memory that no other training shares."""
    if not isinstance(policy, BuiltinPolicy):
        return policy
    names = {kind: name for name, kind in POLICIES.items()}
    name = policy.name or names.get(type(policy), type(policy).__name__)
    return dataclasses.replace(policy, name=name)


def _number(policies: Sequence[Managed]) -> list[Managed]:
    """Numbers policies of the same name."""
    for i, policy in enumerate(policies):
        again = any(other.policy is policy.policy for other in policies[:i])
        if again and policy.state_dict() is not None:
            raise InputError(
                f"policy {policy.name}: the same object is given twice; make one for each"
            )
    names = distinct_names([policy.name for policy in policies])
    return [
        policy if policy.name == name else dataclasses.replace(policy, name=name)
        for policy, name in zip(policies, names, strict=True)
    ]
