"""What the report tells in rows: alerts, interventions, gradients, adapters, events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ulysses_monitor.reading.reader import RunReader
from ulysses_monitor.report.formatting import number, when

__all__ = ["action_rows", "alert_rows", "event_rows", "largest_gradients", "most_unbalanced"]

_LAST = 10
_GRAD = "grad/norm/param/"
_RATIO = "lora/grad_ratio_B_A/module/"


def largest_gradients(frame: pd.DataFrame, most: int = 10) -> pd.DataFrame:
    """The parameters with the largest gradients at the end of a run.

    Args:
        frame: ``grad/norm/param/*`` and ``grad/norm/total``.
        most: rows at most.

    Returns:
        Indexed by `parameter`: `norm`, the mean over the last 10 steps, and `share`, that
        parameter's part of the squared total norm over the same steps.
    """
    end = _end(frame, _GRAD)
    total = frame.get("grad/norm/total", pd.Series(dtype="float64")).reindex(end.index)
    known = np.isfinite(total) & (total > 0)
    share = (end[known] ** 2).sum() / (total[known] ** 2).sum() if known.any() else np.nan
    table = pd.DataFrame({"norm": end.mean(), "share": share}).dropna(subset="norm")
    return table.rename_axis("parameter").nlargest(most, "norm")


def most_unbalanced(frame: pd.DataFrame, most: int = 5) -> pd.DataFrame:
    """The adapters whose two sides' gradients differ most at the end of a run.

    Args:
        frame: ``lora/grad_ratio_B_A/module/*``.
        most: rows at most.

    Returns:
        Indexed by `module`: `ratio`, the median of B over A over the last 10 steps.
    """
    ratio = _end(frame, _RATIO, infinite=True).median()
    ratio = ratio[ratio >= 0]
    with np.errstate(divide="ignore"):
        order = np.log(ratio).abs().sort_values(ascending=False, kind="stable").index[:most]
    return pd.DataFrame({"ratio": ratio.loc[order]}).rename_axis("module")


def _end(frame: pd.DataFrame, prefix: str, *, infinite: bool = False) -> pd.DataFrame:
    """The last rows that hold a metric under `prefix`, the columns without it."""
    columns: pd.DataFrame = frame[[n for n in frame.columns if n.startswith(prefix)]]
    if not infinite:
        columns = columns.replace([np.inf, -np.inf], np.nan)
    end: pd.DataFrame = columns.dropna(how="all").tail(_LAST)
    end.columns = pd.Index([name.removeprefix(prefix) for name in end.columns])
    return end


def alert_rows(run: RunReader) -> list[dict[str, Any]]:
    """Every alert as a dictionary, oldest first."""
    rows = run.events("alert").sort_values("step", kind="stable").to_dict("records")
    keys = ("step", "rule", "severity", "message", "hint")
    return [{k: "" if _missing(row.get(k)) else row[k] for k in keys} for row in rows]


def action_rows(run: RunReader) -> list[dict[str, Any]]:
    """What policies did, or would have done: a row for each policy, action and mode.

    With `policy`, `action`, `mode`, the number of `steps`, the `first` and the `last` of them, and
    the last `reason`; in the order in which they came.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for event in run.event_list("action"):
        key = tuple(str(event.get(name, "")) for name in ("policy", "action", "mode"))
        row = found.setdefault(
            key,  # type: ignore[arg-type]
            {"policy": key[0], "action": key[1], "mode": key[2], "seen": set()},
        )
        row["seen"].add(event["step"])
        row["reason"] = str(event.get("reason", ""))
    return [
        row | {"steps": len(row["seen"]), "first": min(row["seen"]), "last": max(row["seen"])}
        for row in found.values()
    ]


def event_rows(run: RunReader, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Start, evaluations, checkpoints, stop: `step`, `kind`, `when` and `what`, by step.

    Args:
        run: the run.
        frame: its ``eval/*`` metrics, which hold evaluations that left no event.
    """
    events = run.events()
    rows = [
        {
            "step": e.get("step"),
            "kind": str(e["kind"]),
            "when": when(e.get("time")),
            "what": _what(e),
        }
        for e in events[~events["kind"].isin(["alert", "action"])].to_dict("records")
    ]
    if not any(row["kind"] == "eval" for row in rows):
        rows += _evaluations(frame)
    order = {"start": 0, "eval": 1, "checkpoint": 2, "stop": 9}
    return sorted(rows, key=lambda row: (row["step"] or 0, order.get(row["kind"], 3)))


def _what(event: dict[Any, Any]) -> str:
    """The details that an event carries: a column that others have is NaN in its row."""
    details = {k: v for k, v in event.items() if k not in ("kind", "step", "time")}
    return ", ".join(f"{k} {_text(v)}" for k, v in details.items() if not _missing(v))


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _text(value: object) -> str:
    """`value` for people; whole numbers too come as floats, where other rows have none."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() else number(value, 4)


def _evaluations(frame: pd.DataFrame) -> list[dict[str, Any]]:
    columns = frame[[n for n in frame.columns if n.startswith("eval/")]].dropna(how="all")
    columns = columns.rename(columns=lambda n: n.removeprefix("eval/").removesuffix("/total"))
    return [
        {"step": step, "kind": "eval", "when": "", "what": _what(values.dropna().to_dict())}
        for step, values in columns.iterrows()
    ]
