"""From a YAML file and ``key=value`` overrides to a checked `RunConfig`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ulysses_core.config.deepspeed_json import load_deepspeed
from ulysses_core.config.keys import UNSERVED_KEYS, UNSERVED_VALUES
from ulysses_core.config.schema import FinetuningConfig, ModelConfig, RunConfig, RunSettings
from ulysses_core.config.training_arguments import check_training_arguments, training_keys
from ulysses_core.data import DataConfig
from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.masking import mask_secrets

__all__ = ["load_config"]

Section = TypeVar("Section", bound=BaseModel)

_SECTIONS: tuple[type[BaseModel], ...] = (RunSettings, ModelConfig, FinetuningConfig, DataConfig)


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads and checks a config.

    Args:
        path: a YAML file of LLaMA-Factory's form.
        overrides: ``key=value``; a dotted key reaches into a mapping, the value is YAML.

    Raises:
        InputError: the file, a key or a value is wrong.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return _build(path, values)


def _build(path: Path, values: dict[str, Any]) -> RunConfig:
    where = str(path)
    owned = {key: section for section in _SECTIONS for key in _keys(section)}
    _check_keys(values, [*owned, *training_keys()], where)
    given: dict[type[BaseModel], dict[str, Any]] = {section: {} for section in _SECTIONS}
    training = {}
    for key, value in values.items():
        if key in owned:
            given[owned[key]][key] = value
        else:
            training[key] = value
    settings = _section(RunSettings, given[RunSettings], where)
    deepspeed, size = load_deepspeed(settings.deepspeed, where)
    if size is not None and "sequence_parallel_size" not in values:
        settings = settings.model_copy(update={"sequence_parallel_size": size})
    return RunConfig(
        name=path.stem,
        settings=settings,
        deepspeed=deepspeed,
        model=_section(ModelConfig, given[ModelConfig], where),
        finetuning=_section(FinetuningConfig, given[FinetuningConfig], where),
        data=_section(DataConfig, given[DataConfig], where),
        training=check_training_arguments(training, where),
        given=values,
    )


def _keys(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _check_keys(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for key, value in values.items():
        if key in UNSERVED_KEYS:
            raise InputError(
                f"{where}: key {key!r} is LLaMA-Factory's; this project does not serve it"
            )
        if key not in known:
            hint = nearest(str(key), known) or "; see the README for the keys"
            raise InputError(f"{where}: unknown key {key!r}{hint}")
        if isinstance(value, str) and value in UNSERVED_VALUES.get(key, ()):
            raise InputError(f"{where}: {key}={value!r} is not served in this version")


def _section(section: type[Section], values: dict[str, Any], where: str) -> Section:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        got = f", got {mask_secrets({key: first['input']})[key]!r}" if key else ""
        prefix = f"{where}: {key}: " if key else f"{where}: "
        raise InputError(f"{prefix}{text}{got}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error, not the later one's silent win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} twice", problem_mark=node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: cannot be read as text: {error}") from None
    values = _parse(text, f"config {path}")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"config {path}: is not a mapping of keys to values; see examples/")
    return values


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not YAML: {problem}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: allowed is key=value, such as learning_rate=1e-4")
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"override {override!r}: {parent!r} is not a mapping")
        target = inner
    target[last] = _parse(text, f"override {override!r}")
