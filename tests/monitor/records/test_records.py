from __future__ import annotations

import numpy as np
import pytest

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.records import Alert, Metric, Schema, StepRecord, column


@pytest.mark.parametrize(
    "name", ["grad/norm/total", "grad/norm/layer/3", "optim/exp_avg_norm/param/a.b-c.weight"]
)
def test_a_name_of_family_stat_and_scope_is_accepted(name: str) -> None:
    assert Metric(name=name).name == name


@pytest.mark.parametrize("name", ["loss", "grad/norm", "grad//total", "Grad/norm/total", "a/b/c d"])
def test_any_other_name_is_refused_and_shown(name: str) -> None:
    with pytest.raises(InputError, match=name):
        Metric(name=name)


def test_a_schema_refuses_a_name_that_appears_twice_and_names_it() -> None:
    with pytest.raises(InputError, match="'b/b/b' is declared twice"):
        Schema(("a/a/a", "b/b/b", "c/c/c", "b/b/b"))


def test_a_record_gives_its_values_by_name() -> None:
    record = StepRecord.of(3, 1.5, {"a/a/a": 1.0, "b/b/b": 2.0})
    assert (record["b/b/b"], record.get("a/a/a")) == (2.0, 1.0)
    assert "a/a/a" in record
    assert "c/c/c" not in record
    assert np.isnan(record.get("c/c/c"))
    assert record.get("c/c/c", 7.0) == 7.0
    assert record.to_dict() == {"a/a/a": 1.0, "b/b/b": 2.0}
    with pytest.raises(KeyError):
        record["c/c/c"]


def test_patterns_match_across_slashes_in_the_schemas_order() -> None:
    schema = Schema(("grad/norm/total", "grad/norm/layer/1", "grad/norm/layer/0", "a/b/c"))
    assert schema.match("grad/*") == list(schema.names[:3])
    assert schema.match("grad/norm/layer/*") == ["grad/norm/layer/1", "grad/norm/layer/0"]


def test_a_column_has_nan_where_a_record_lacks_the_name() -> None:
    history = [StepRecord.of(1, 0.0, {"a/a/a": 1.0}), StepRecord.of(2, 0.0, {"b/b/b": 1.0})]
    np.testing.assert_array_equal(column(history, "a/a/a"), [1.0, np.nan])


def test_an_alert_keeps_everything_as_an_event() -> None:
    alert = Alert(rule="r", step=4, metric="a/a/a", value=2.0, threshold=1.0, message="m", hint="h")
    event = alert.to_event(9.0)
    assert (event.kind, event.step, event.time) == ("alert", 4, 9.0)
    assert event.data == {
        "rule": "r",
        "metric": "a/a/a",
        "value": 2.0,
        "threshold": 1.0,
        "message": "m",
        "hint": "h",
        "severity": "warning",
    }


def test_an_alert_as_an_event_says_where_since_when_why_and_what_it_asks_for() -> None:
    more = {"where": "layer/3", "since": 2, "page": "docs/rules/r.md"}
    alert = Alert(
        rule="r",
        step=4,
        metric="a/a/a",
        value=2.0,
        threshold=1.0,
        message="m",
        causes=("one", "two"),
        command=("save",),
        **more,  # type: ignore[arg-type]
    )
    expected = more | {"causes": ["one", "two"], "command": ["save"]}
    assert {key: alert.to_event(9.0).data[key] for key in expected} == expected
