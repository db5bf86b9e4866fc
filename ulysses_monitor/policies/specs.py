"""Policies by name, as YAML configs and `Monitor` take them."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.policies.base import BuiltinPolicy, Decide, Policy, check_value
from ulysses_monitor.policies.clipping import AGC, AdaGC, AutoClip, ThresholdClipping, ZClip
from ulysses_monitor.policies.lora import LoraBalance
from ulysses_monitor.policies.managed import LATE_START, Managed
from ulysses_monitor.policies.rescue import LiftVanishing
from ulysses_monitor.policies.schedules import FreezeSchedule, WarmupCosine
from ulysses_monitor.policies.small import (
    AnnealedNoise,
    Centralization,
    GradientNoise,
    LearningRateBoost,
    SmallGradientScaling,
)
from ulysses_monitor.policies.spikes import SkipOutliers, SpikeEscalation
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

_PATH = re.compile(r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")
_COMMON = ("name", "mode", "late", "late_start")


def make_policies(specs: Any) -> list[Managed]:
    """Policies from what a user names them by, each under a name of its own.

    Args:
        specs: the name of a preset, the path of a YAML file with a list under ``policies``, or a
            list. In a list, each is a policy; a function of the history; the name of a policy, of
            a preset, or the import path of a function or class, ``package.module:name``; or a
            mapping of one of these names to settings, such as ``{"zclip": {"z": 3.0}}``. Of the
            settings, `name`, `mode` (off, shadow, active), `late` (settings that differ, or off)
            and `late_start` (share of all steps, 0.9) are every policy's.

    Raises:
        InputError: a name, a setting, or an object is wrong.
    """
    return _apart([each for spec in _as_list(specs) for each in _made(spec, "", load=True)])


def check_policies(specs: Any) -> None:
    """Checks what `make_policies` would make, without importing what is the user's.

    Raises:
        InputError: a name, a setting or the form of an import path is wrong.
    """
    for spec in _as_list(specs):
        list(_made(spec, "", load=False))


def _apart(policies: Sequence[Managed]) -> list[Managed]:
    """Gives policies of one name numbers, none of which is another's name."""
    given = {policy.name for policy in policies}
    found: dict[str, Managed] = {}
    for policy in policies:
        name = policy.name
        twice = any(other.policy is policy.policy for other in found.values())
        if twice and policy.state_dict() is not None:
            raise InputError(f"policy {name}: the same object is given twice; make one for each")
        if name in found:
            numbered = (f"{policy.name}-{number}" for number in itertools.count(2))
            name = next(n for n in numbered if n not in given and n not in found)
            policy = dataclasses.replace(policy, name=name)
        found[name] = policy
    return list(found.values())


def _as_list(specs: Any) -> Sequence[Any]:
    if isinstance(specs, Path):
        return _file(specs)
    if isinstance(specs, str):
        return _file(Path(specs)) if specs.endswith((".yaml", ".yml")) else [specs]
    if isinstance(specs, Mapping) or not isinstance(specs, Sequence):
        raise InputError(
            f"policies: got {type(specs).__name__}; allowed is a list of policies, one of the "
            f"presets {', '.join(PRESETS)}, or the path of a YAML file"
        )
    return specs


def _file(path: Path) -> Sequence[Any]:
    try:
        return _listed(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(f"policies {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"policies {path}: no UTF-8: {error}") from None


def _listed(text: str, where: str) -> Sequence[Any]:
    try:
        held = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2025-13-01 is a ValueError
        raise InputError(f"policies {where}: no YAML: {' '.join(str(error).split())}") from None
    found = held.get("policies") if isinstance(held, Mapping) else held
    if not isinstance(found, list):
        raise InputError(f"policies {where}: has no list under the key policies")
    others = [key for key in held if key != "policies"] if isinstance(held, Mapping) else []
    if others:
        raise InputError(f"policies {where}: has a key {others[0]!r}; allowed is policies alone")
    return found


def _made(spec: Any, preset: str, *, load: bool) -> Iterator[Managed]:
    if not isinstance(spec, str | Mapping):
        yield _given(spec)
        return
    name, settings = (spec, {}) if isinstance(spec, str) else _entry(spec)
    if name in PRESETS:
        if settings:
            raise InputError(f"preset {name}: takes no settings; list its policies instead")
        for inner in _preset(name):
            yield from _made(inner, name, load=load)
    elif name in POLICIES:
        yield _own(name, settings, preset)
    elif isinstance(name, str) and _PATH.match(name):
        if load:
            yield _imported(name, settings)
        else:
            _common(name, settings)
    else:
        hint = nearest(str(name), [*POLICIES, *PRESETS])
        raise InputError(
            f"policies: {name!r} is no policy{hint}; allowed are {', '.join(POLICIES)}, the "
            f"presets {', '.join(PRESETS)}, or an import path, package.module:function"
        )


def _preset(name: str) -> Sequence[Any]:
    file = resources.files("ulysses_monitor.policies") / "presets" / f"{name}.yaml"
    return _listed(file.read_text(encoding="utf-8"), name)


def _entry(spec: Mapping[Any, Any]) -> tuple[Any, dict[str, Any]]:
    if len(spec) != 1:
        names = ", ".join(map(str, spec)) or "none"
        raise InputError(
            f"policies: a mapping with the keys {names}; allowed is one policy's name and, "
            "indented under it, its settings"
        )
    ((name, given),) = spec.items()
    settings = {} if given is None else given
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        raise InputError(f"policy {name}: got {given!r}; allowed is a mapping of settings")
    return name, dict(settings)


def _own(name: str, settings: dict[str, Any], preset: str) -> Managed:
    common, own = _split(settings)
    policy = _build(name, own)
    late = common.get("late")
    if isinstance(late, Mapping) and late:
        common["late"] = _build(name, own | {str(key): value for key, value in late.items()})
    return Managed(policy=policy, preset=preset, **_common(name, common))


def _build(name: str, settings: Mapping[str, Any]) -> BuiltinPolicy:
    kind = POLICIES[name]
    allowed = [f.name for f in dataclasses.fields(kind) if f.init and f.name != "name"]
    for key in settings:
        if key not in allowed:
            raise InputError(
                f"policy {name}: no setting {key!r}{nearest(key, allowed)}; allowed are "
                f"{', '.join([*allowed, *_COMMON])}"
            )
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    try:
        return kind(name=name, **{k: _value(v, types[k]) for k, v in settings.items()})
    except TypeError as error:  # a text where a number belongs
        raise InputError(f"policy {name}: {error}") from None


def _value(value: Any, kind: str) -> Any:
    """As YAML means it: lists are tuples, and 1e-3, which YAML takes for a text, is a number."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and kind.startswith("float"):
        with suppress(ValueError):
            return float(value)
    return value


def _split(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    common = {key: value for key, value in settings.items() if key in _COMMON}
    return common, {key: value for key, value in settings.items() if key not in _COMMON}


def _common(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a policy's settings those that `Managed` has, checked."""
    own = settings.get("name", name)
    if not isinstance(own, str) or not own or not own.isprintable() or "=" in own or "*" in own:
        raise InputError(f"policy {name}: name is {own!r}; allowed is text without = and *")
    given = settings.get("mode")
    mode: Any = "off" if given is False else given  # what YAML makes of off
    if mode is not None and mode not in get_args(Mode):
        allowed = ", ".join(get_args(Mode))
        raise InputError(f"policy {own}: mode is {mode!r}; allowed is one of {allowed}")
    late = "off" if settings.get("late") is False else settings.get("late")
    if late is not None and late != "off" and not isinstance(late, BuiltinPolicy):
        allowed = "settings that differ, or off" if name in POLICIES else "off"
        raise InputError(f"policy {own}: late is {late!r}; allowed is {allowed}")
    start = _value(settings.get("late_start", LATE_START), "float")
    check_value(own, "late_start", start, 0, 0.999999)
    if late is None and "late_start" in settings:
        raise InputError(f"policy {own}: late_start without late; say what is other then")
    return {"name": own, "mode": mode, "late": late, "late_start": float(start)}


def _imported(path: str, settings: dict[str, Any]) -> Managed:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise InputError(f"policy {path}: cannot be imported: {error}") from error
    except AttributeError:
        raise InputError(f"policy {path}: {module} has no {attribute}") from None
    common, own = _split(settings)
    if isinstance(found, type):
        try:
            found = found(**own)
        except TypeError as error:
            raise InputError(f"policy {path}: {error}") from None
    elif own:
        raise InputError(f"policy {path}: a function takes no settings, got {', '.join(own)}")
    name, policy = _parts(found)
    return Managed(policy=policy, **_common(name, common))


def _given(policy: Any) -> Managed:
    if isinstance(policy, Managed):
        return policy
    name, policy = _parts(policy)
    return Managed(policy=policy, **_common(name, {}))


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function of the history as a policy."""

    name: str
    decide: Decide


def _parts(policy: Any) -> tuple[str, Policy]:
    if isinstance(policy, type):
        raise InputError(f"monitor: policy {policy.__name__} is a class; allowed is an object")
    if isinstance(policy, BuiltinPolicy):
        kinds = {kind: name for name, kind in POLICIES.items()}
        name = policy.name or kinds.get(type(policy), type(policy).__name__)
        # Without what it remembers of another training.
        return name, dataclasses.replace(policy, name=name)
    if isinstance(policy, Policy):
        return str(policy.name), policy
    if callable(policy):
        name = str(getattr(policy, "__name__", type(policy).__name__))
        return name, _Function(name, policy)
    raise InputError(
        f"monitor: policy {type(policy).__name__} is no function, and has no name and "
        "decide(history)"
    )
