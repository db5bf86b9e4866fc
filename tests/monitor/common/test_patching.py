from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from ulysses_monitor.common.patching import Undo, patch_method, undo_all


class Greeter:
    def greet(self, name: str) -> str:
        return f"hello {name}"


def shout(original: Any, *args: Any, **kwargs: Any) -> str:
    return original(*args, **kwargs).upper()


def test_a_patch_affects_one_instance_and_is_undone_without_a_trace() -> None:
    one, other = Greeter(), Greeter()
    undo = patch_method(one, "greet", shout)
    assert one.greet(name="a") == "HELLO A"
    assert other.greet("a") == "hello a"
    undo()
    assert one.greet("a") == "hello a"
    assert vars(one) == {}


def test_an_attribute_of_the_instance_itself_is_restored() -> None:
    one = Greeter()
    own = lambda name: f"own {name}"  # noqa: E731
    one.greet = own  # type: ignore[method-assign]
    undo = patch_method(one, "greet", shout)
    assert one.greet("a") == "OWN A"
    undo()
    assert vars(one) == {"greet": own}


def test_a_later_patch_stays_and_reaches_the_original() -> None:
    one = Greeter()
    undo = patch_method(one, "greet", shout)
    patch_method(one, "greet", lambda original, name: f"<{original(name)}>")
    undo()
    assert one.greet("a") == "<hello a>"


def test_patches_undone_in_reverse_order_leave_no_trace() -> None:
    one = Greeter()
    undos = [patch_method(one, "greet", lambda original, n: original(n) + "!") for _ in range(3)]
    assert one.greet("a") == "hello a!!!"
    undo_all(undos)
    assert undos == []
    assert vars(one) == {}


def test_an_error_of_the_original_passes_through_and_the_patch_stays() -> None:
    one = Greeter()
    undo = patch_method(one, "greet", shout)
    with pytest.raises(TypeError):
        one.greet()  # type: ignore[call-arg]
    assert one.greet("a") == "HELLO A"
    undo()
    undo()  # a second time changes nothing
    assert vars(one) == {}


def test_undo_all_runs_the_latest_first() -> None:
    order: list[int] = []
    undos: list[Undo] = [lambda i=i: order.append(i) for i in range(3)]  # type: ignore[misc]
    undo_all(undos)
    assert order == [2, 1, 0]


def test_a_method_of_a_class_and_a_function_of_a_module_are_put_back() -> None:
    class Made:
        def count(self, n: int) -> int:
            return n

    module = ModuleType("module")
    module.double = lambda n: 2 * n  # type: ignore[attr-defined]
    made, before = Made(), (Made.count, module.double)
    undos = [
        patch_method(Made, "count", lambda original, self, n: original(self, n) + 1),
        patch_method(module, "double", lambda original, n: original(n) + 1),
    ]
    assert (made.count(1), module.double(1)) == (2, 3)
    undo_all(undos)
    assert (Made.count, module.double) == before
    assert (made.count(1), module.double(1)) == (1, 2)
