"""Reads a YAML file and ``key=value`` overrides into a validated `RunConfig`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ulysses_core.config.agreement import check_agreement
from ulysses_core.config.answers import AnswersConfig
from ulysses_core.config.deepspeed_json import load_deepspeed
from ulysses_core.config.export import ExportConfig
from ulysses_core.config.finetuning import FinetuningConfig
from ulysses_core.config.keys import REFUSED, WITHOUT_EFFECT, AcceptedKeys, refuse_key
from ulysses_core.config.schema import ModelConfig, RunConfig, RunSettings
from ulysses_core.config.training_arguments import check_training_arguments, training_keys
from ulysses_core.data import DataConfig
from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.validation import describe_problem

__all__ = ["SECTIONS", "load_config", "read_values"]

Section = TypeVar("Section", bound=BaseModel)

SECTIONS: tuple[type[BaseModel], ...] = (
    AcceptedKeys,
    ExportConfig,
    RunSettings,
    ModelConfig,
    FinetuningConfig,
    DataConfig,
    AnswersConfig,
)
"""The parts of a config, besides the stage's own keys."""


def load_config(
    path: Path, overrides: Iterable[str], stages: Mapping[str, type[BaseModel]]
) -> RunConfig:
    """Reads and validates a config.

    Args:
        path: a YAML file with LLaMA-Factory's keys.
        overrides: ``key=value``; a dotted key sets an entry of a nested mapping, and the value is
            YAML.
        stages: the keys of each stage.

    Raises:
        InputError: the file, a key or a value is wrong.
    """
    return _build(path, read_values(path, overrides), stages)


def read_values(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """Reads the keys of a YAML file, and applies ``key=value`` overrides.

    Raises:
        InputError: the file or an override is wrong.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply_override(values, override)
    return values


def _build(path: Path, values: dict[str, Any], stages: Mapping[str, type[BaseModel]]) -> RunConfig:
    where = str(path)
    keys = _find_stage_keys(values, stages, where)
    sections = (*SECTIONS, keys)
    own = {key for section in sections for key in _list_keys(section)}
    _check_keys(values, [*own, *training_keys()], where)
    by_section = {  # a stage may have a key that a section has too, such as max_new_tokens
        section: {key: values[key] for key in _list_keys(section) if key in values}
        for section in sections
    }
    training = {key: values[key] for key in training_keys() if key in values and key not in own}
    _validate(AcceptedKeys, by_section[AcceptedKeys], where)
    settings = _validate(RunSettings, by_section[RunSettings], where)
    if settings.pure_bf16:
        training["bf16"] = True
    if settings.disable_shuffling:
        training["train_sampling_strategy"] = "sequential"
    deepspeed, size = load_deepspeed(settings.deepspeed, where)
    if not settings.do_train and _zero_stage(deepspeed) < 3:
        deepspeed = None  # which transformers evaluates without training under ZeRO-3 only
    if size is not None and "sequence_parallel_size" not in values:
        settings = settings.model_copy(update={"sequence_parallel_size": size})
    config = RunConfig(
        name=path.stem,
        settings=settings,
        deepspeed=deepspeed,
        model=_validate(ModelConfig, by_section[ModelConfig], where),
        finetuning=_validate(FinetuningConfig, by_section[FinetuningConfig], where),
        data=_validate(DataConfig, by_section[DataConfig], where),
        export=_validate(ExportConfig, by_section[ExportConfig], where),
        answers=_validate(AnswersConfig, by_section[AnswersConfig], where),
        stage_keys=_validate(keys, by_section[keys], where),
        training=check_training_arguments(training, where),
        raw=values,
    )
    check_agreement(config, where)
    if config.data.streaming and config.training.get("max_steps", -1) < 1:
        raise InputError(
            f"{where}: streaming is true, but max_steps is not set; set it, because the length of "
            "a stream is unknown"
        )
    return config


def _zero_stage(deepspeed: dict[str, Any] | None) -> int:
    zero = (deepspeed or {}).get("zero_optimization")
    return int(zero.get("stage", 0)) if isinstance(zero, dict) else 0


def _find_stage_keys(
    values: Mapping[str, Any], stages: Mapping[str, type[BaseModel]], where: str
) -> type[BaseModel]:
    """Returns the keys of the config's stage, and refuses those of other stages by name."""
    stage = values.get("stage", FinetuningConfig.model_fields["stage"].default)
    if stage not in stages:
        hint = nearest(str(stage), stages)
        raise InputError(f"{where}: stage is {stage!r}{hint}; allowed: {', '.join(stages)}")
    general = {key for section in SECTIONS for key in _list_keys(section)}
    own = general.union(_list_keys(stages[stage]))
    for key in values:
        others = [name for name, keys in stages.items() if key in _list_keys(keys)]
        if others and key not in own:
            raise InputError(
                f"{where}: {key} is a key of stage {' and '.join(others)}; stage is {stage}, so "
                "remove it"
            )
    return stages[stage]


def _list_keys(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _check_keys(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for key, value in values.items():
        if key in known or key in WITHOUT_EFFECT:
            continue
        if key in REFUSED:
            refuse_key(key, value, where)
        else:
            hint = nearest(str(key), known) or "; docs/training.md lists the keys"
            raise InputError(f"{where}: unknown key {key!r}{hint}")


def _validate(section: type[Section], values: dict[str, Any], where: str) -> Section:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {describe_problem(error, section)}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a duplicate key is an error; PyYAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key!r}", problem_mark=node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: cannot read it as text: {error}") from None
    values = _parse(text, f"config {path}")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"config {path}: not a mapping of keys to values; see examples/")
    return values


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not valid YAML: {problem}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: expected key=value, such as learning_rate=1e-4")
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(
                f"override {override!r}: {parent} is {inner!r}, not a mapping; "
                f"set {parent} itself, or remove the dot"
            )
        target = inner
    target[last] = _parse(text, f"override {override!r}")
