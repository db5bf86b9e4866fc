"""The report's tables: alerts, interventions, gradients, adapters, events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ulysses_monitor.common.formatting import number, when
from ulysses_monitor.reading import RunReader
from ulysses_monitor.records.answers import read_answers

__all__ = [
    "GRADIENT",
    "LAST_STEPS",
    "RATIO",
    "find_largest_gradients",
    "find_most_unbalanced",
    "list_alerts",
    "list_answers",
    "list_events",
    "summarize_actions",
]

LAST_STEPS = 10
GRADIENT = "grad/norm/param/"
RATIO = "lora/grad_ratio_B_A/module/"


def find_largest_gradients(frame: pd.DataFrame, limit: int = 10) -> pd.DataFrame:
    """Finds the parameters with the largest gradients in the last 10 recorded steps.

    Args:
        frame: ``grad/norm/param/*`` and ``grad/norm/total``; an infinite norm comes first.
        limit: the largest number of rows.

    Returns:
        A frame indexed by `parameter`, largest first, with `norm`, the mean gradient norm over
        these steps, and `share`, the parameter's fraction of the squared total norm over these
        steps.
    """
    end = _last_rows(frame, GRADIENT, keep_infinite=True)
    total = frame.get("grad/norm/total", pd.Series(dtype="float64")).reindex(end.index)
    known = np.isfinite(total) & (total > 0)
    share = (
        (end[known].replace(np.inf, np.nan) ** 2).sum() / (total[known] ** 2).sum()
        if known.any()
        else np.nan
    )
    table = pd.DataFrame({"norm": end.mean(), "share": share}).dropna(subset="norm")
    return table.rename_axis("parameter").nlargest(limit, "norm")


def find_most_unbalanced(frame: pd.DataFrame, limit: int = 5) -> pd.DataFrame:
    """Finds the LoRA modules whose A and B have the most unequal gradients at the end of a run.

    Args:
        frame: ``lora/grad_ratio_B_A/module/*``.
        limit: the largest number of rows.

    Returns:
        A frame indexed by `module`, most unequal first, with `ratio`, the median over the last 10
        recorded steps of B's gradient norm over A's; may be infinite.
    """
    ratio = _last_rows(frame, RATIO, keep_infinite=True).median()
    ratio = ratio[ratio >= 0]
    with np.errstate(divide="ignore"):
        order = np.log(ratio).abs().sort_values(ascending=False, kind="stable").index[:limit]
    return pd.DataFrame({"ratio": ratio.loc[order]}).rename_axis("module")


def _last_rows(frame: pd.DataFrame, prefix: str, *, keep_infinite: bool = False) -> pd.DataFrame:
    """Returns the last rows that hold a metric under `prefix`, which is cut from the columns."""
    columns: pd.DataFrame = frame[[n for n in frame.columns if n.startswith(prefix)]]
    if not keep_infinite:
        columns = columns.replace([np.inf, -np.inf], np.nan)
    end: pd.DataFrame = columns.dropna(how="all").tail(LAST_STEPS)
    end.columns = pd.Index([name.removeprefix(prefix) for name in end.columns])
    return end


def list_alerts(run: RunReader) -> list[dict[str, Any]]:
    """Lists the alerts of a run by step.

    Returns:
        For each alert `step`, `rule`, `severity`, `message` and `hint`; a missing one is empty.
    """
    rows = run.events("alert").sort_values("step", kind="stable").to_dict("records")
    keys = ("step", "rule", "severity", "message", "hint")
    return [{k: "" if _is_missing(row.get(k)) else row[k] for k in keys} for row in rows]


def list_answers(run: RunReader, limit: int = 6) -> list[dict[str, Any]]:
    """Lists the answers that a run recorded, by prompt.

    Args:
        run: the run.
        limit: the most steps of a prompt: the first, the last, and evenly between them.

    Returns:
        For each prompt, in order, `prompt`, `reference` (None if there is none) and `answers`: for
        each of these steps `step` and `text`. A step that was trained twice counts once.
    """
    found: dict[str, dict[str, Any]] = {}
    for event in run.event_list("answers"):
        for answer in read_answers(event):
            new: dict[str, Any] = {
                "prompt": answer.prompt,
                "reference": answer.reference,
                "texts": {},
            }
            row = found.setdefault(answer.prompt, new)
            row["texts"][event["step"]] = answer.text
    for row in found.values():
        steps = sorted(row["texts"])
        places = np.unique(np.linspace(0, len(steps) - 1, min(limit, len(steps))).round())
        shown = [steps[int(place)] for place in places]
        row["answers"] = [{"step": step, "text": row["texts"][step]} for step in shown]
    return list(found.values())


def summarize_actions(run: RunReader) -> list[dict[str, Any]]:
    """Summarizes what the policies of a run did, or would have done in shadow mode.

    Returns:
        For each policy, action and mode, in order of appearance: `policy`, `action`, `mode`;
        `steps`, the number of steps; `first` and `last`, the first and the last of them; `reason`,
        the last one given.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for event in run.event_list("action"):
        policy, action, mode = (str(event.get(name, "")) for name in ("policy", "action", "mode"))
        new = {"policy": policy, "action": action, "mode": mode, "seen": set()}
        row = found.setdefault((policy, action, mode), new)
        row["seen"].add(event["step"])
        row["reason"] = str(event.get("reason", ""))
    return [
        row | {"steps": len(row["seen"]), "first": min(row["seen"]), "last": max(row["seen"])}
        for row in found.values()
    ]


def list_events(run: RunReader, evaluations: pd.DataFrame) -> list[dict[str, Any]]:
    """Lists the events of a run by step, except alerts, actions and answers.

    Args:
        run: the run.
        evaluations: its ``eval/*`` metrics, for runs that recorded no event for their evaluations.

    Returns:
        For each event `step`, `kind`, `when` and `details`, all but the step as text.
    """
    events = run.events()
    shown = events[~events["kind"].isin(["alert", "action", "answers"])].to_dict("records")
    rows = [_event_row(e.get("step"), str(e["kind"]), when(e.get("time")), e) for e in shown]
    if not any(row["kind"] == "eval" for row in rows):
        rows += _list_evaluations(evaluations)
    order = {"start": 0, "eval": 1, "checkpoint": 2, "stop": 9}
    return sorted(rows, key=lambda row: (row["step"] or 0, order.get(row["kind"], 3)))


def _format_details(event: dict[Any, Any]) -> str:
    """Formats the details of an event, which has NaN in the columns of other events."""
    details = {k: v for k, v in event.items() if k not in ("kind", "step", "time")}
    return ", ".join(f"{k} {_format(v)}" for k, v in details.items() if not _is_missing(v))


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _format(value: object) -> str:
    """Formats a value; a column with missing values holds its integers as floats."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() else number(value, 4)


def _list_evaluations(frame: pd.DataFrame) -> list[dict[str, Any]]:
    columns = frame[[n for n in frame.columns if n.startswith("eval/")]].dropna(how="all")
    columns = columns.rename(columns=lambda n: n.removeprefix("eval/").removesuffix("/total"))
    return [
        _event_row(step, "eval", "", row.dropna().to_dict()) for step, row in columns.iterrows()
    ]


def _event_row(step: Any, kind: str, when: str, details: dict[Any, Any]) -> dict[str, Any]:
    return {"step": step, "kind": kind, "when": when, "details": _format_details(details)}
