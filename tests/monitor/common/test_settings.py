"""Settings are checked against their annotations; nothing is coerced, and errors are one line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.expectations import Expected
from ulysses_monitor.common.settings import (
    MetricName,
    Text,
    Texts,
    check_fields,
    check_settings,
    checked_arguments,
    read_numbers,
)


@dataclass(frozen=True, kw_only=True)
class Owner:
    z: Annotated[float, Field(gt=0, le=100)] = 2.5
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    count: Annotated[int, Field(ge=1)] = 1
    window: Annotated[int, Field(ge=2, le=100_000)] = 2
    limit: Annotated[float, Field(gt=0)] | None = None
    always: bool = False
    mode: Literal["off", "on"] = "off"
    label: Text = "x"
    targets: Texts = ("*",)
    metric: MetricName = "grad/norm/total"
    place: Annotated[Text | Path, Expected("a path")] = "here"

    def __post_init__(self) -> None:
        check_fields("owner", self)


@pytest.mark.parametrize(
    ("setting", "wrong", "expected"),
    [
        *(("z", v, "expected a number above 0 and at most 100") for v in (0, 101, True, "5", None)),
        *(("z", v, "expected a number above 0") for v in (math.nan, math.inf, [1.0])),
        *(("share", v, "expected a number from 0 to 1") for v in (-0.1, 1.1, False)),
        *(("count", v, "expected an integer of 1 or more") for v in (0, True, 2.0, "2", None)),
        ("window", 1, "expected an integer from 2 to 100,000"),
        ("limit", 0, "expected a number above 0"),
        *(("always", v, "expected true or false") for v in (0, 1, "yes", None)),
        *(("mode", v, "allowed: off, on") for v in ("maybe", False, None)),
        *(("label", v, "expected text") for v in ("", 3, None)),
        *(("targets", v, "expected a list of texts") for v in ("*", [], {"a": 1}, None)),
        *(("metric", v, "expected the name of one metric, such") for v in ("a/*", "a?", "", 3)),
        ("place", 3, "expected a path"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_given_and_what_is_expected(
    setting: str, wrong: Any, expected: str
) -> None:
    with pytest.raises(InputError) as error:
        Owner(**{setting: wrong})
    assert str(error.value).startswith(f"owner: {setting} is {wrong!r}; {expected}")
    assert "\n" not in str(error.value)


def test_a_wrong_item_of_a_list_is_named_by_its_place() -> None:
    with pytest.raises(InputError, match=r"^owner: targets\.1 is 3; expected text$"):
        Owner(targets=["a", 3])


def test_a_secret_is_masked_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "swordfish-0123")
    with pytest.raises(InputError, match="metric is") as error:
        Owner(metric="swordfish-0123*")
    assert "swordfish" not in str(error.value)


def test_right_values_are_kept_as_the_types_that_are_declared() -> None:
    owner = Owner(z=3, share=np.float64(0.5), targets=["a", "b"], place=Path("x"), limit=2)
    assert (owner.z, owner.targets, owner.place, owner.limit) == (3.0, ("a", "b"), Path("x"), 2.0)
    assert dataclasses.replace(owner, z=4.0).targets == ("a", "b")


def test_only_given_values_are_checked_and_returned() -> None:
    assert check_settings("owner", Owner, {"z": 1}) == {"z": 1.0}
    assert check_settings("owner", Owner, {}) == {}


def test_texts_become_numbers_where_a_float_is_declared() -> None:
    given = {"z": "1e-3", "limit": "5", "count": "5", "label": "5", "share": "some", "other": "1"}
    read = {"z": 1e-3, "limit": 5.0, "count": "5", "label": "5", "share": "some", "other": "1"}
    assert read_numbers(Owner, given) == read


class Sink:
    @checked_arguments("sink demo")
    def __init__(
        self, port: Annotated[int, Field(ge=0, le=65535)] = 1, *, names: Sequence[str] = ()
    ) -> None:
        self.given = port, names


class Derived(Sink):
    def __init__(self) -> None:
        super().__init__(7)


def test_a_constructors_arguments_are_checked_by_name_and_by_place() -> None:
    assert Sink().given == (1, ())
    assert Sink(3, names=["a"]).given == (3, ["a"])
    assert Derived().given == (7, ())
    for wrong in (lambda: Sink(-1), lambda: Sink(port=-1)):
        with pytest.raises(InputError, match=r"sink demo: port is -1; expected an integer from 0"):
            wrong()
    with pytest.raises(InputError, match="sink demo: names is 'a'"):
        Sink(names="a")
    with pytest.raises(TypeError, match="colour"):
        Sink(colour=1)  # type: ignore[call-arg]
