"""A decision on its way from the policy to the event."""

from __future__ import annotations

import pytest

from ulysses_monitor.policies import Outcome
from ulysses_monitor.records import Action

SCALE = Action(kind="scale", values={"factor": 2.0}, reason="small", read={"grad/norm/total": 0.1})


def test_in_shadow_the_event_says_what_was_asked_for_and_nothing_more() -> None:
    event = Outcome(policy="mine", action=SCALE, mode="shadow", note="unused").to_event(3, 5.0)
    assert (event.kind, event.step, event.time) == ("action", 3, 5.0)
    assert event.data == {
        "policy": "mine",
        "action": "scale",
        "mode": "shadow",
        "values": {"factor": 2.0},
        "targets": ["*"],
        "reason": "small",
        "read": {"grad/norm/total": 0.1},
    }


def test_an_active_event_adds_norms_tensors_and_a_note() -> None:
    names = [f"layer.{i}" for i in range(12)]
    outcome = Outcome(
        policy="mine", action=SCALE, tensors=names, norm_before=1.0, norm_after=2.0
    ).with_note("half of it")
    data = outcome.to_event(1, 0.0).data
    assert (data["norm_before"], data["norm_after"], data["note"]) == (1.0, 2.0, "half of it")
    assert (data["tensors"], data["tensor_count"]) == (names[:10], 12)


@pytest.mark.parametrize(
    ("kind", "values", "target"),
    [
        ("scale", {"factor": 1.0}, "gradients"),
        ("lr_factor", {"factor": 1.0}, "rate"),
        ("skip", {}, "update"),
        ("stop", {}, "training"),
    ],
)
def test_an_outcome_knows_what_its_action_changes(
    kind: str, values: dict[str, float], target: str
) -> None:
    assert Outcome(policy="p", action=Action(kind=kind, values=values)).target == target
