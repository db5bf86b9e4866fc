"""One way to name a thing (a sink, a policy, a rule) in Python and in YAML."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.settings import read_numbers
from ulysses_monitor.common.yaml_lists import read_list

__all__ = ["Named", "Registry", "distinct_names"]

T = TypeVar("T")

_PATH = re.compile(r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Named:
    """A thing that was given by its name.

    Attributes:
        name: a known name, or an import path.
        settings: what was given beside it.
    """

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Registry(Generic[T]):
    """Makes things from names, mappings of a name to settings, import paths and objects.

    Attributes:
        word: the noun for one thing, such as ``policy``.
        plural: the noun for several things; also the key of a YAML file.
        known: the project's own things by name: a class, or its import path, which is imported only
            when the thing is made.
        protocol: the protocol that an object must satisfy.
        needs: the protocol in words, such as ``check(history)``.
        wrap: makes a thing from a name and a plain function; None if a function is not allowed.
        presets: functions that return the list that a preset's name stands for.
        common: settings that every thing has beside its own; the caller takes them out first.
        takes_files: whether a name or a YAML file may stand for a list.
        hides_values: whether a value may be a secret that messages must not repeat.
    """

    word: str
    plural: str
    known: Mapping[str, str | Callable[..., T]]
    protocol: type[Any]
    needs: str
    wrap: Callable[[str, Callable[..., Any]], T] | None = None
    presets: Mapping[str, Callable[[], Sequence[Any]]] = field(default_factory=dict)
    common: Sequence[str] = ()
    takes_files: bool = True
    hides_values: bool = False

    # -- lists ---------------------------------------------------------------------------------

    def make_all(self, specs: Any) -> list[T]:
        """Makes everything that `specs` names.

        Raises:
            InputError: a name, a setting or an object is wrong.
        """
        return [self.make(spec) for spec, _ in self.expand(specs)]

    def check_all(self, specs: Any) -> None:
        """Checks what `make_all` would make, without importing what is the user's.

        Raises:
            InputError: a name, a setting or the form of an import path is wrong.
        """
        for spec, _ in self.expand(specs):
            self.check(spec)

    def expand(self, specs: Any) -> Iterator[tuple[Any, str]]:
        """Yields each spec with the preset that brought it; empty if the user gave the spec.

        Args:
            specs: a list of specs; if `takes_files`, also one name or the path of a YAML file.

        Raises:
            InputError: `specs` is something else.
        """
        for spec in self._as_list(specs):
            preset = self._preset(spec)
            if preset is None:
                yield spec, ""
            else:
                yield from ((inner, preset) for inner, _ in self.expand(self.presets[preset]()))

    def _as_list(self, specs: Any) -> Sequence[Any]:
        if self.takes_files and isinstance(specs, Path):
            return read_list(specs, self.plural)
        if self.takes_files and isinstance(specs, str):
            is_file = specs.endswith((".yaml", ".yml"))
            return read_list(Path(specs), self.plural) if is_file else [specs]
        if isinstance(specs, str | Mapping) or not isinstance(specs, Collection):
            ways = [f"a list of {self.plural}, such as [{next(iter(self.known))}]"]
            ways += [f"a preset ({', '.join(self.presets)})"] if self.presets else []
            ways += ["the path of a YAML file"] if self.takes_files else []
            given = type(specs).__name__
            raise InputError(f"{self.plural}: got {given}; expected {_either(ways)}")
        return list(specs)

    def _preset(self, spec: Any) -> str | None:
        if not isinstance(spec, str | Mapping):
            return None
        name, settings = (spec, None) if isinstance(spec, str) else self._only_entry(spec)
        if not isinstance(name, str) or name not in self.presets:
            return None
        if settings:
            raise InputError(
                f"preset {name}: takes no settings; list its {self.plural} one by one instead"
            )
        return name

    # -- one thing -----------------------------------------------------------------------------

    def make(self, spec: Any) -> T:
        """Makes what `spec` names.

        Args:
            spec: a known name; the import path, ``package.module:name``, of a class, a function or
                an object; a mapping of one of these to settings; or an object.

        Raises:
            InputError: a name, a setting or an object is wrong.
        """
        named = self.parse(spec)
        return self.accept(spec) if named is None else self.build(named)

    def check(self, spec: Any) -> None:
        """Checks what `make` would make, without importing what is the user's."""
        named = self.parse(spec)
        if named is None or named.name in self.known:
            self.make(spec)

    def parse(self, spec: Any) -> Named | None:
        """Returns the name and the settings in `spec`; None if it is an object."""
        if not isinstance(spec, str | Mapping):
            return None
        name, given = (spec, None) if isinstance(spec, str) else self._only_entry(spec)
        if not isinstance(name, str) or not (name in self.known or _PATH.match(name)):
            raise InputError(self._unknown(name))
        settings = {} if given is None else given
        if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
            shown = type(given).__name__ if self.hides_values else repr(given)
            raise InputError(
                f"{self.word} {name}: got {shown}; expected a mapping of settings to values"
            )
        return Named(name, dict(settings))

    def build(self, named: Named) -> T:
        """Makes the thing that has a name, with its settings; see `make`."""
        where = f"{self.word} {named.name}"
        if named.name not in self.known:
            return self.accept(_construct(where, _load(where, named.name), named.settings), where)
        known = self.known[named.name]
        kind = _load(where, known) if isinstance(known, str) else known
        _check_names(where, kind, named.settings, self.common)
        return self.accept(kind(**read_numbers(kind, named.settings)), where)

    def accept(self, thing: Any, where: str = "") -> T:
        """Checks that an object is a thing, and wraps a function if functions are allowed."""
        if isinstance(thing, type):
            name = thing.__name__
            raise InputError(f"{self.word} {name}: is a class; expected an object, {name}(...)")
        if isinstance(thing, self.protocol):
            return cast("T", thing)
        if self.wrap is not None and callable(thing):
            return self.wrap(str(getattr(thing, "__name__", type(thing).__name__)), thing)
        function = "a function, or " if self.wrap is not None else ""
        raise InputError(
            f"{where or self.plural}: an object of type {type(thing).__name__} is not a "
            f"{self.word}; expected {function}an object with {self.needs}"
        )

    # -- errors --------------------------------------------------------------------------------

    def _only_entry(self, spec: Mapping[Any, Any]) -> tuple[Any, Any]:
        if len(spec) != 1:
            keys = ", ".join(map(str, spec)) or "none"
            raise InputError(
                f"{self.plural}: a mapping has the keys {keys}; expected one {self.word}'s name "
                "and, indented under it, its settings"
            )
        return next(iter(spec.items()))

    def _unknown(self, name: Any) -> str:
        hint = nearest(str(name), [*self.known, *self.presets])
        known = ", ".join(self.known)
        presets = f"the presets {', '.join(self.presets)}, " if self.presets else ""
        return (
            f"{self.plural}: {name!r} is not a {self.word}{hint}; allowed: {known}, {presets}"
            "or an import path, package.module:name"
        )


def distinct_names(names: Sequence[str]) -> list[str]:
    """Numbers repeated names: ``a``, ``a-2``, ``a-3``; skips numbers that another name has."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        free = (other for other in numbered if other not in names and other not in found)
        found.append(next(free) if name in found else name)
    return found


def _either(ways: Sequence[str]) -> str:
    *first, last = ways
    return f"{', '.join(first)}, or {last}" if first else last


def _load(where: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise InputError(f"{where}: cannot be imported: {error}") from error
    except AttributeError:
        raise InputError(f"{where}: {module} has no {attribute}") from None
    except Exception as error:  # whatever the user's own module raises
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


def _construct(where: str, found: Any, settings: Mapping[str, Any]) -> Any:
    """Makes an object of a user's class; returns a function or an object as it is."""
    if not isinstance(found, type):
        if settings:
            given = ", ".join(settings)
            raise InputError(f"{where}: got the settings {given}; only a class takes settings")
        return found
    _check_names(where, found, settings)
    try:
        return found(**settings)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # whatever the user's own code raises
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


def _check_names(
    where: str, kind: Callable[..., Any], settings: Mapping[str, Any], common: Sequence[str] = ()
) -> None:
    """Checks that `kind` takes these settings and needs no others; messages list `common`, too."""
    try:
        parameters = inspect.signature(kind).parameters
    except ValueError:  # of a class written in C
        return
    if any(each.kind in _VARIADIC for each in parameters.values()):
        return
    shown = ", ".join([*(name for name in parameters if name not in common), *common])
    for name in settings:
        if name not in parameters:
            hint = nearest(name, parameters)
            raise InputError(f"{where}: unknown setting {name!r}{hint}; allowed: {shown or 'none'}")
    for name, each in parameters.items():
        if each.default is inspect.Parameter.empty and name not in settings:
            raise InputError(f"{where}: the setting {name} is missing; allowed: {shown}")
