"""Policies are named in YAML or given as objects; errors come before the training."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitor.policies.policy_records import asked, record, series, values_of
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.policies import (
    POLICIES,
    PRESETS,
    BuiltinPolicy,
    Managed,
    check_policies,
    make_policies,
)
from ulysses_monitor.policies.base import MAX_STEPS
from ulysses_monitor.policies.clipping import AutoClip, ZClip
from ulysses_monitor.policies.noise import GradientNoise
from ulysses_monitor.policies.small_gradients import LearningRateBoost
from ulysses_monitor.policies.tensor_clipping import AGC
from ulysses_monitor.records import Action, StepRecord


class Own:
    """A user's policy."""

    def __init__(self, size: float = 3.0) -> None:
        self.name, self.size = "own", size

    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        return []


class Nameless:
    def decide(self, history: Sequence[StepRecord]) -> Iterable[Action]:
        return []


class Forgetful(Own):
    """Returns None instead of a state."""

    def state_dict(self) -> Any:
        return None

    def load_state_dict(self, state: Any) -> None: ...


class Derived(BuiltinPolicy):
    pass


class Tuned(ZClip):
    pass


def own_function(history: Sequence[StepRecord]) -> list[Action]:
    return []


OBJECT = Own(7.0)
HERE = __name__


def names(specs: Any) -> list[str]:
    return [policy.name for policy in make_policies(specs)]


def message_of(specs: Any, make: Any = make_policies) -> str:
    """Returns the error's message, which must be one line."""
    with pytest.raises(InputError) as error:
        make(specs)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- ways to name a policy --------------------------------------------------------------------


def test_names_settings_presets_import_paths_functions_and_objects_all_make_policies() -> None:
    given = ZClip(z=4.0)
    policies = make_policies(
        [
            "autoclip",
            {"zclip": {"z": 3}},
            given,
            own_function,
            f"{HERE}:own_function",
            {f"{HERE}:Own": {"size": 5}},
            f"{HERE}:OBJECT",
            lambda _: [],
            "ulysses-pro",
        ]
    )
    first, second, third, fourth, fifth, sixth, seventh, eighth, *preset = policies
    assert first.policy == AutoClip(name="autoclip")
    assert second.policy == ZClip(name="zclip", z=3)
    assert third.policy == dataclasses.replace(given, name="zclip")
    assert third.policy is not given  # it may serve another training, too
    assert (fourth.name, fifth.name) == ("own_function", "own_function-2")
    assert (sixth.name, sixth.policy.size) == ("own", 5)  # type: ignore[attr-defined]
    assert (seventh.name, seventh.policy) == ("own-2", OBJECT)
    assert eighth.name == "<lambda>"
    assert {p.preset for p in preset} == {"ulysses-pro"}
    assert all(p.preset == "" and p.mode is None and p.late is None for p in policies[:8])


@pytest.mark.parametrize("spec", ["zclip", {"zclip": None}, {"zclip": {}}])
def test_a_policy_without_settings_can_be_written_in_several_ways(spec: Any) -> None:
    (policy,) = make_policies([spec])
    assert (policy.name, policy.policy) == ("zclip", ZClip(name="zclip"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_can_be_named_alone_or_among_others(preset: str) -> None:
    alone = names(preset)
    assert names([preset]) == names([{preset: None}]) == alone
    assert names(["agc", preset]) == ["agc", *alone]


def test_every_policy_of_the_project_can_be_named() -> None:
    for name, kind in POLICIES.items():
        settings = {"targets": ["*"]} if name == "freeze" else {}
        (policy,) = make_policies([{name: settings}])
        assert type(policy.policy) is kind
        assert policy.policy.name == policy.name == name


def test_an_empty_list_makes_no_policies() -> None:
    assert make_policies([]) == make_policies(()) == []


def test_a_builtin_object_without_a_name_gets_the_name_in_the_registry() -> None:
    assert names([ZClip(), AGC(), ZClip(name="mine")]) == ["zclip", "agc", "mine"]
    assert names([Tuned(), Derived()]) == ["Tuned", "Derived"]


# -- YAML files -------------------------------------------------------------------------------


def file(folder: Path, text: str | bytes, name: str = "policies.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml"])
def test_a_file_holds_a_list_or_a_list_under_policies(tmp_path: Path, name: str) -> None:
    entries = "- zclip: {z: 3.0, late: off}\n- skip_outliers\n"
    listed = file(tmp_path, entries, name)
    assert names(listed) == ["zclip", "skip_outliers"]
    assert make_policies(listed)[0].late == "off"
    keyed = file(tmp_path, "policies:\n" + entries, name)
    assert names(keyed) == ["zclip", "skip_outliers"]
    assert names(Path(keyed)) == ["zclip", "skip_outliers"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policies: [zclip", "not valid YAML: while parsing"),
        ("policies: 2025-13-01", "not valid YAML: month must be in 1..12"),
        ("policies: @a", "not valid YAML"),
        ("\x00", "not valid YAML"),
        (b"\xff\xfe\xff", "not UTF-8"),
        ("", "holds no list; expected a list, or one under policies"),
        ("zclip", "holds no list; expected a list, or one under policies"),
        ("policies: zclip", "holds no list; expected a list, or one under policies"),
        ("policies:", "holds no list; expected a list, or one under policies"),
        ("policy: [zclip]", "holds no list; expected a list, or one under policies"),
        ("policies: [zclip]\nmode: shadow", "has the key 'mode'; allowed: policies"),
    ],
)
def test_a_file_without_a_list_is_refused_with_its_path(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = file(tmp_path, text)
    assert message_of(path).startswith(f"policies {path}: {message}")


def test_an_unreadable_file_is_refused_with_its_path(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    assert message_of(missing) == f"policies {missing}: No such file or directory"
    (tmp_path / "folder.yaml").mkdir()
    assert "Is a directory" in message_of(str(tmp_path / "folder.yaml"))


def test_a_number_that_yaml_reads_as_text_becomes_a_number() -> None:
    read = yaml.safe_load("[{lr_boost: {below: 1e-3, late: {factor: 11e-1}, late_start: 8e-1}}]")
    assert read[0]["lr_boost"]["below"] == "1e-3"
    (policy,) = make_policies(read)
    assert policy.policy == LearningRateBoost(name="lr_boost", below=1e-3)
    assert policy.late == LearningRateBoost(name="lr_boost", below=1e-3, factor=1.1)
    assert policy.late_start == 0.8


def test_a_list_in_yaml_becomes_a_tuple() -> None:
    read = yaml.safe_load("[{gradient_noise: {targets: ['*.weight']}}]")
    assert make_policies(read)[0].policy == GradientNoise(
        name="gradient_noise", targets=("*.weight",)
    )


# -- settings of every policy ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "mode"),
    [("off", "off"), (False, "off"), ("shadow", "shadow"), ("active", "active"), (None, None)],
)
def test_a_policy_has_its_own_mode_or_the_mode_of_the_run(given: Any, mode: str | None) -> None:
    """YAML reads off as false."""
    for spec in ({"zclip": {"mode": given}}, {f"{HERE}:own_function": {"mode": given}}):
        assert make_policies([spec])[0].mode == mode


def test_a_policy_can_be_renamed_and_duplicate_names_get_numbers() -> None:
    assert names([{"zclip": {"name": "my clip"}}]) == ["my clip"]
    assert names(["zclip", "zclip", "zclip"]) == ["zclip", "zclip-2", "zclip-3"]
    taken = ["zclip", "zclip", {"agc": {"name": "zclip-2"}}, "zclip"]
    assert names(taken) == ["zclip", "zclip-3", "zclip-2", "zclip-4"]
    first = [{"agc": {"name": "zclip-2"}}, "zclip", "zclip", {"agc": {"name": "zclip-2"}}]
    assert names(first) == ["zclip-2", "zclip", "zclip-3", "zclip-2-2"]


def test_numbering_a_policy_leaves_the_users_object_alone() -> None:
    mine = Managed(name="zclip", policy=ZClip())
    found = make_policies(["zclip", mine])
    assert ([p.name for p in found], mine.name) == (["zclip", "zclip-2"], "zclip")
    assert found[1].policy is mine.policy


def test_late_settings_override_the_others() -> None:
    spec = {"lr_boost": {"below": 0.5, "late": {"factor": 1.1}}}
    (policy,) = make_policies([spec])
    late = LearningRateBoost(name="lr_boost", below=0.5, factor=1.1)
    assert (policy.late, policy.late_start) == (late, 0.9)


def boosted(late: Any, start: float | None = None) -> list[int]:
    """Returns the steps, of 100, at which the rate is multiplied by 1.2."""
    own = {"late": late} | ({} if start is None else {"late_start": start})
    (policy,) = make_policies([{"lr_boost": own}])
    records = series("grad/abs_mean/tensor_mean", [1e-4] * 100, train__max_steps__total=100.0)
    factors = [values_of(actions) for actions in asked(policy, records)]
    return [step for step, f in enumerate(factors, 1) if f == [("lr_factor", {"factor": 1.2})]]


@pytest.mark.parametrize("start", [0.29, 0.55, 0.9, None])
@pytest.mark.parametrize("late", ["off", {"factor": 1.1}])
def test_the_late_phase_begins_after_its_share_of_all_steps(late: Any, start: float | None) -> None:
    assert boosted(late, start) == list(range(1, 1 + round(100 * (start or 0.9))))


def test_without_a_known_number_of_steps_there_is_no_late_phase() -> None:
    for late in ("off", {"factor": 1.1}):
        (policy,) = make_policies([{"lr_boost": {"late": late}}])
        assert policy.needed_metrics[-1] == MAX_STEPS
        records = series("grad/abs_mean/tensor_mean", [1e-4] * 3)
        assert [values_of(a) for a in asked(policy, records)] == [
            [("lr_factor", {"factor": 1.2})]
        ] * 3


def test_the_memory_carries_over_into_the_late_phase() -> None:
    """A spell of three steps starts before the late phase and ends in it."""
    (policy,) = make_policies([{"lr_boost": {"longest": 3, "late": {"factor": 1.1}}}])
    records = [
        record(step, {"grad/abs_mean/tensor_mean": 1e-4, MAX_STEPS: 10.0}) for step in range(8, 12)
    ]
    found = [values_of(actions) for actions in asked(policy, records)]
    assert [v[0][1]["factor"] if v else None for v in found] == [1.2, 1.2, 1.1, None]


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("zclp", r"policies: 'zclp' is not a policy (did you mean 'zclip'?); allowed: adagc, agc"),
        (["ulysses_pro"], "(did you mean 'ulysses-pro'?)"),
        ([{"zclp": {"z": 3}}], "(did you mean 'zclip'?)"),
        (["qqqq"], "policies: 'qqqq' is not a policy; allowed: "),
        (["qqqq"], f"the presets {', '.join(PRESETS)}, or an import path, package.module:name"),
        (["a b:C"], "is not a policy"),
        (["module:"], "is not a policy"),
        (["os; import:x"], "is not a policy"),
        ([{3: {}}], "policies: 3 is not a policy"),
        ([{None: {}}], "policies: None is not a policy"),
        (None, "policies: got NoneType; expected a list of policies, such as [adagc], a preset ("),
        (3, "policies: got int"),
        ({"zclip": {}}, "policies: got dict; expected a list"),
        (
            [None],
            "policies: an object of type NoneType is not a policy; expected a function, or an",
        ),
        (
            [3.5],
            "type float is not a policy; expected a function, or an object with name and decide(",
        ),
        ([["zclip"]], "policies: an object of type list is not a policy"),
        (
            [Nameless()],
            "policies: an object of type Nameless is not a policy; expected a function, ",
        ),
        ([Own], "policy Own: is a class; expected an object, Own(...)"),
        ([Forgetful()], "policy own: state_dict() gives None; allowed is a mapping"),
        (
            [{"zclip": {}, "agc": {}}],
            "a mapping has the keys zclip, agc; expected one policy's name",
        ),
        ([{}], "a mapping has the keys none"),
        ([{"zclip": 3}], "policy zclip: got 3; expected a mapping of settings"),
        ([{"zclip": ["z"]}], "policy zclip: got ['z']; expected a mapping of settings"),
        ([{"zclip": {3: 1}}], "policy zclip: got {3: 1}; expected a mapping of settings"),
        ([{"adaptive": {"mode": "off"}}], "preset adaptive: takes no settings; list its policies"),
        ([{"zclip": {"alfa": 1}}], "policy zclip: unknown setting 'alfa' (did you mean 'alpha'?)"),
        ([{"zclip": {"beta": 1}}], "; allowed: warmup, alpha, z, name, mode, late, late_start"),
        ([{"zclip": {"memory": {}}}], "policy zclip: unknown setting 'memory'"),
        ([{"zclip": {"z": "high"}}], "policy zclip: z is 'high'; expected a number above 0"),
        ([{"zclip": {"z": None}}], "policy zclip: z is None"),
        ([{"zclip": {"z": True}}], "policy zclip: z is True"),
        ([{"zclip": {"z": [2.5]}}], "policy zclip: z is [2.5]; expected a number"),
        ([{"zclip": {"z": {"a": 1}}}], "policy zclip: z is {'a': 1}"),
        ([{"zclip": {"z": "nan"}}], "policy zclip: z is nan"),
        ([{"zclip": {"warmup": "25"}}], "policy zclip: warmup is '25'; expected an integer from 2"),
        ([{"agc": {"targets": "*.weight"}}], "policy agc: targets is '*.weight'; expected a li"),
        ([{"freeze": {}}], "policy freeze: targets is []; expected a list of texts"),
        (["freeze"], "policy freeze: targets is []"),
        ([{"skip_outliers": {"metrics": 3}}], "policy skip_outliers: metrics is 3; expected a"),
        (
            [{"centralize": {"always": "yes"}}],
            "policy centralize: always is 'yes'; expected true",
        ),
    ],
)
def test_a_wrong_policy_is_refused_with_a_message_that_helps(specs: Any, message: str) -> None:
    assert message in message_of(specs)
    if not isinstance(specs, list) or not isinstance(specs[0], Forgetful):
        assert message_of(specs, check_policies) == message_of(specs)


COMMON: list[tuple[dict[str, Any], str]] = [
    ({"mode": "on"}, "mode is 'on'; allowed: off, shadow, active"),
    ({"mode": True}, "mode is True; allowed: "),
    ({"mode": 0}, "mode is 0; allowed: "),
    ({"mode": ["off"]}, "mode is ['off']"),
    ({"late": True}, "late is True; expected "),
    ({"late": 0}, "late is 0; expected "),
    ({"late": "on"}, "late is 'on'; expected "),
    ({"late": []}, "late is []; expected "),
    ({"late": {}}, "late is {}; expected "),
    ({"late": "off", "late_start": 1.0}, "late_start is 1.0; expected a number above 0"),
    ({"late": "off", "late_start": 0}, "late_start is 0; expected a number above 0"),
    ({"late": "off", "late_start": "soon"}, "late_start is 'soon'"),
    ({"late": "off", "late_start": None}, "late_start is None"),
    ({"late_start": 0.5}, "late_start is given without late; add late, or remove it"),
    ({"name": ""}, "name is ''; expected text without = and *"),
    ({"name": "a=b"}, "name is 'a=b'; expected"),
    ({"name": "*"}, "name is '*'; expected"),
    ({"name": "two\nlines"}, r"name is 'two\nlines'; expected"),
    ({"name": 3}, "name is 3; expected"),
    ({"name": None}, "name is None; expected"),
]


@pytest.mark.parametrize("policy", ["zclip", f"{HERE}:own_function", f"{HERE}:Own"])
@pytest.mark.parametrize(("settings", "message"), COMMON)
def test_a_wrong_name_mode_or_late_phase_is_refused(
    policy: str, settings: dict[str, Any], message: str
) -> None:
    found = message_of([{policy: settings}])
    assert found.startswith("policy ")
    assert message in found
    assert message in message_of([{policy: settings}], check_policies)


@pytest.mark.parametrize(
    ("late", "message"),
    [
        ({"z": "x"}, "z is 'x'"),
        ({"w": 1}, "unknown setting 'w'"),
        ({3: 1}, "unknown setting '3'"),
        ({"mode": "off"}, "late has the setting 'mode'"),
    ],
)
def test_wrong_settings_of_the_late_phase_are_refused(late: Any, message: str) -> None:
    assert message in message_of([{"zclip": {"late": late}}])


def test_the_name_of_an_object_is_checked_too() -> None:
    assert "name is 'a=b'" in message_of([GradientNoise(name="a=b")])


class Remembers:
    name = "remembers"

    def decide(self, history: Any) -> list[Any]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def test_the_same_object_twice_is_refused_only_if_it_has_a_memory() -> None:
    policy = Remembers()
    assert "the same object is given twice" in message_of([policy, policy])
    assert "the same object is given twice" in message_of([make_policies([policy])[0], policy])
    assert names([own_function, own_function]) == ["own_function", "own_function-2"]
    ours = ZClip()  # of which each gets a copy
    assert names([ours, ours]) == ["zclip", "zclip-2"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_at_all:x", "cannot be imported: No module named"),
        (f"{HERE}:Nothing", f"{HERE} has no Nothing"),
        (f"{HERE}:HERE", "an object of type str is not a policy"),
        (f"{HERE}:Nameless", "an object of type Nameless is not a policy"),
        ({f"{HERE}:Own": {"colour": 1}}, "unknown setting 'colour'; allowed: size"),
        (
            {f"{HERE}:own_function": {"size": 1}},
            "got the settings size; only a class takes settings",
        ),
        ({f"{HERE}:own_function": {"late": {"size": 1}}}, "late is {'size': 1}; expected off"),
    ],
)
def test_an_import_path_must_lead_to_a_policy(spec: Any, message: str) -> None:
    assert message in message_of([spec])


def test_checking_does_not_import_the_users_code() -> None:
    before = set(sys.modules)
    check_policies(["colorsys_of_mine.policies:own", {"antigravity:fly": {"size": 1}}])
    assert "antigravity" not in set(sys.modules) - before
    check_policies("adaptive")
    check_policies(["zclip", {"agc": {"ratio": "1e-2"}}])
