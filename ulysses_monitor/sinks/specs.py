"""Sinks by name, as YAML configs and `Monitor` take them."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.sinks.base import Sink

__all__ = ["check_sinks", "make_sinks"]

_KNOWN = {
    "console": "ulysses_monitor.sinks.console:ConsoleSink",
    "csv": "ulysses_monitor.sinks.csv_file:CsvSink",
    "jsonl": "ulysses_monitor.sinks.jsonl:JsonlSink",
    "memory": "ulysses_monitor.sinks.memory:MemorySink",
    "mlflow": "ulysses_monitor.sinks.mlflow:MlflowSink",
    "opentelemetry": "ulysses_monitor.sinks.opentelemetry:OpenTelemetrySink",
    "prometheus": "ulysses_monitor.sinks.prometheus:PrometheusSink",
    "tensorboard": "ulysses_monitor.sinks.tensorboard:TensorBoardSink",
    "wandb": "ulysses_monitor.sinks.wandb:WandbSink",
    "webhook": "ulysses_monitor.sinks.webhook:WebhookSink",
}
_PATH = re.compile(r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")


def make_sinks(specs: Sequence[Any]) -> list[Sink]:
    """Sinks from what a user names them by; none of them opens anything yet.

    Args:
        specs: each a sink; a name such as ``"csv"``; the import path of a class,
            ``"package.module:Class"``; or a mapping of one of these two to the arguments, such as
            ``{"prometheus": {"port": 9464}}``.

    Raises:
        InputError: a name, an argument or a class is wrong.
    """
    return [_make(spec) for spec in _as_list(specs)]


def check_sinks(specs: Sequence[Any]) -> None:
    """Checks what `make_sinks` would make, without importing a user's class.

    Raises:
        InputError: a name, an argument or the form of an import path is wrong.
    """
    for spec in _as_list(specs):
        if isinstance(spec, str | Mapping) and _parse(spec)[0] not in _KNOWN:
            continue
        _make(spec)


def _as_list(specs: Sequence[Any]) -> Sequence[Any]:
    if isinstance(specs, str | Mapping) or not isinstance(specs, Sequence):
        raise InputError(f"sinks: got {type(specs).__name__}; allowed is a list such as [csv]")
    return specs


def _make(spec: Any) -> Sink:
    if not isinstance(spec, str | Mapping):
        return _checked(spec)
    name, arguments = _parse(spec)
    kind = _load(name)
    _check_arguments(name, kind, arguments)
    return _checked(kind(**arguments))


def _parse(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments. Values are never repeated in a message: one may be a secret."""
    name, given = (spec, None) if isinstance(spec, str) else _only_entry(spec)
    if not isinstance(name, str) or (name not in _KNOWN and not _PATH.match(name)):
        hint = nearest(str(name), _KNOWN) or ""
        raise InputError(
            f"sinks: {name!r} is no sink{hint}; allowed are {', '.join(_KNOWN)}, or the import "
            "path of a class, package.module:Class"
        )
    arguments = {} if given is None else given
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise InputError(
            f"sink {name}: got {type(given).__name__}; allowed is a mapping of arguments to values"
        )
    return name, dict(arguments)


def _only_entry(spec: Mapping[str, Any]) -> tuple[str, Any]:
    if len(spec) != 1:
        names = ", ".join(map(str, spec)) or "none"
        raise InputError(
            f"sinks: a mapping with the keys {names}; allowed is one sink's name and, indented "
            "under it, its arguments"
        )
    return next(iter(spec.items()))


def _load(name: str) -> Any:
    module, _, attribute = _KNOWN.get(name, name).partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise InputError(f"sink {name}: cannot be imported: {error}") from error
    except AttributeError:
        raise InputError(f"sink {name}: {module} has no {attribute}") from None
    if not isinstance(kind, type):
        raise InputError(f"sink {name}: {attribute} is no class")
    return kind


def _check_arguments(name: str, kind: Any, arguments: Mapping[str, Any]) -> None:
    signature = inspect.signature(kind)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        allowed = ", ".join(map(str, signature.parameters.values())) or "none"
        hint = "".join(
            nearest(key, signature.parameters)
            for key in arguments
            if key not in signature.parameters
        )
        raise InputError(f"sink {name}: {error}{hint}; allowed arguments: {allowed}") from None


def _checked(sink: Any) -> Sink:
    if isinstance(sink, type):
        raise InputError(f"sink {sink.__name__} is a class; allowed is an object of it")
    if not isinstance(sink, Sink):
        raise InputError(f"sink {type(sink).__name__} has no write, flush and close methods")
    return sink
