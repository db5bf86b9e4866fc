"""One registry for everything that a user can name; see the specs' own tests for each kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import pytest
from pydantic import Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.registry import Named, Registry, distinct_names
from ulysses_monitor.common.settings import check_fields


@runtime_checkable
class Reward(Protocol):
    def score(self, text: str) -> float: ...


@dataclass
class Length:
    scale: Annotated[float, Field(gt=0, le=10)] = 1.0

    def __post_init__(self) -> None:
        check_fields("reward length", self)

    def score(self, text: str) -> float:
        return self.scale * len(text)


@dataclass
class FromFunction:
    name: str
    score: Callable[[str], float]


class Open:
    """Takes whatever it is given."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def score(self, text: str) -> float:
        return 0.0


class Broken(Open):
    def __init__(self, size: int = 3) -> None:
        raise TypeError("size is not a size")


class Needy(Length):
    def __init__(self, scale: float) -> None:
        super().__init__(scale=scale)


def constant(text: str) -> float:
    return 7.0


READY = Length(scale=5)

REWARDS: Registry[Reward] = Registry(
    word="reward",
    plural="rewards",
    known={"length": Length, "lazy": f"{__name__}:Length", "far": "antigravity:fly"},
    protocol=Reward,
    needs="score(text)",
    wrap=FromFunction,
    presets={"both": lambda: ["length", {"lazy": {"scale": 2}}]},
)


@pytest.mark.parametrize(
    ("spec", "score"),
    [
        ("length", 3.0),
        ({"length": None}, 3.0),
        ({"length": {"scale": 2}}, 6.0),
        ({"length": {"scale": "2e0"}}, 6.0),
        ({"lazy": {"scale": 2}}, 6.0),
        (READY, 15.0),
        (constant, 7.0),
        (f"{__name__}:constant", 7.0),
        (f"{__name__}:READY", 15.0),
        (f"{__name__}:Length", 3.0),
        ({f"{__name__}:Length": {"scale": 4}}, 12.0),
        ({f"{__name__}:Open": {"colour": "red"}}, 0.0),
    ],
)
def test_a_name_a_mapping_a_path_a_function_and_an_object_make_a_thing(
    spec: Any, score: float
) -> None:
    assert REWARDS.make(spec).score("abc") == score


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenght", "rewards: 'lenght' is not a reward (did you mean 'length'?); allowed: length, "),
        ("lenght", "lazy, far, the presets both, or an import path, package.module:name"),
        ({"length": {"scal": 1}}, "reward length: unknown setting 'scal' (did you mean 'scale'?)"),
        ({"length": {"scal": 1}}, "; allowed: scale"),
        ({"length": {"scale": 0}}, "reward length: scale is 0; expected a number above 0 and at "),
        ({"length": 3}, "reward length: got 3; expected a mapping of settings to values"),
        ({"length": {}, "lazy": {}}, "rewards: a mapping has the keys length, lazy; expected one "),
        (Length, "reward Length: is a class; expected an object, Length(...)"),
        (3, "rewards: an object of type int is not a reward; expected a function, or an object "),
        (f"{__name__}:__name__", "an object of type str is not a reward"),
        (f"{__name__}:missing", f"reward {__name__}:missing: {__name__} has no missing"),
        ("no_such_module:x", "reward no_such_module:x: cannot be imported: No module named"),
        ({f"{__name__}:constant": {"size": 1}}, "got the settings size; only a class takes settin"),
        (f"{__name__}:Needy", "the setting scale is missing; allowed: scale"),
        (f"{__name__}:Broken", f"reward {__name__}:Broken: size is not a size"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        REWARDS.make(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_preset_stands_for_its_list() -> None:
    assert [reward.score("abc") for reward in REWARDS.make_all(["both", constant])] == [3, 6, 7]
    assert list(REWARDS.expand("both")) == [("length", "both"), ({"lazy": {"scale": 2}}, "both")]
    assert list(REWARDS.expand(["length"])) == [("length", "")]


def test_checking_does_not_import_the_users_code() -> None:
    REWARDS.check_all(["length", {"antigravity:float": {"size": 1}}])
    assert "antigravity" not in sys.modules
    with pytest.raises(InputError, match="scale is 11"):
        REWARDS.check_all([{"length": {"scale": 11}}])


def test_a_spec_is_parsed_into_a_name_and_settings() -> None:
    assert REWARDS.parse("length") == Named("length", {})
    assert REWARDS.parse({"a.b:c": {"x": 1}}) == Named("a.b:c", {"x": 1})
    assert REWARDS.parse(READY) is None


def test_where_functions_are_not_allowed_they_are_refused_and_secrets_are_not_repeated() -> None:
    strict: Registry[Reward] = Registry(
        word="reward",
        plural="rewards",
        known={"length": Length},
        protocol=Reward,
        needs="score(text)",
        takes_files=False,
        hides_values=True,
    )
    with pytest.raises(InputError, match="of type function is not a reward; expected an object"):
        strict.make(constant)
    with pytest.raises(InputError, match="reward length: got str; expected a mapping"):
        strict.make({"length": "s3cr3t"})
    with pytest.raises(InputError, match=r"got str; expected a list of rewards, such as \[length"):
        strict.make_all("length")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        (["a", "a", "a-2", "a"], ["a", "a-3", "a-2", "a-4"]),
        (["a-2", "a", "a", "a-2"], ["a-2", "a", "a-3", "a-2-2"]),
    ],
)
def test_repeated_names_get_numbers_that_no_other_name_has(
    names: list[str], expected: list[str]
) -> None:
    assert distinct_names(names) == expected
