"""Writes report.html: a run on one self-contained page, with no scripts or external requests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from ulysses_monitor.common import formatting as fmt
from ulysses_monitor.common.errors import InputError
from ulysses_monitor.reading import RunReader, read_failure
from ulysses_monitor.report import tables
from ulysses_monitor.report.html import check_target, render_page, write_page
from ulysses_monitor.report.plots import finite_values, nonfinite_steps
from ulysses_monitor.report.recorded import read_recorded
from ulysses_monitor.report.sections import draw_sections

__all__ = ["write_report"]

Entry = tuple[str, str, str]
"""A label, its value, and a note; the note may be empty."""

_HOST_KEYS = ("host", "platform", "python", "user", "pid")
_MAX_ALERTS, _MAX_EVENTS, _MAX_PROMPTS = 50, 500, 20


def write_report(run: RunReader, path: Path | None = None) -> Path:
    """Writes the report of a run, finished or live, and returns the file's path.

    The page opens without a network. It replaces an earlier report only once it is complete.

    Args:
        run: the run.
        path: the file to write; ``report.html`` in the run directory if None.

    Raises:
        InputError: the folder of `path` does not exist, `path` is a directory, or `path` is None
            and the run is at a URL.
    """
    path = _default_path(run) if path is None else Path(path)
    check_target("report", path, "report.html")
    write_page(path, render_page("report.html.j2", _context(run)))
    return path


def _default_path(run: RunReader) -> Path:
    if run.location.local is None:
        raise InputError(
            f"report: {run.location} is a URL, and no report is written there; "
            "name a local file with --output FILE"
        )
    return run.path / "report.html"


def _context(run: RunReader) -> dict[str, Any]:
    """Returns everything the template uses; the template escapes all text from the run."""
    recorded = read_recorded(run)
    frame = recorded.frame
    info, summary = run.info, run.summary()
    alerts = tables.list_alerts(run)
    return {
        "damaged": list(run.damaged.items()),
        "info": info,
        "summary": summary,
        "ends_broken": _ends_broken(summary),
        "facts": _list_facts(info, summary, frame),
        "figures": _list_key_figures(summary, frame, alerts),
        "failure": read_failure(run),
        "alerts": alerts[:_MAX_ALERTS],
        "more_alerts": len(alerts) - _MAX_ALERTS,
        "actions": tables.summarize_actions(run),
        "answers": tables.list_answers(run)[:_MAX_PROMPTS],
        "charts": draw_sections(recorded, [a["step"] for a in alerts]),
        "unbalanced": list(tables.find_most_unbalanced(recorded.ratios)["ratio"].items()),
        "largest": _add_bars(tables.find_largest_gradients(recorded.gradients)),
        "config": json.dumps(info.get("config") or {}, indent=2, ensure_ascii=False, default=str),
        "versions": _as_mapping(info.get("versions")),
        "host": [(key, info[key]) for key in _HOST_KEYS if key in info],
        "events": tables.list_events(run, recorded.evaluations)[:_MAX_EVENTS],
        "written": datetime.now(UTC).timestamp(),
    }


# -- the header ----------------------------------------------------------------------------------


def _list_facts(
    info: Mapping[str, Any], summary: Mapping[str, Any], frame: pd.DataFrame
) -> list[Entry]:
    """Lists facts about the run."""
    model, starts = _as_mapping(info.get("model")), list(info.get("starts") or [])
    steps, planned = summary["steps"], info.get("max_steps")
    total, trainable = model.get("parameters"), model.get("trainable_parameters")
    part = f"{fmt.share(trainable / total)} of all" if total and trainable is not None else ""
    ended = f"ended {fmt.when(info['ended'])}" if info.get("ended") else ""
    return [
        (
            "Started",
            fmt.when(starts[0]) if starts else fmt.DASH,
            _describe_resumes(starts) or ended,
        ),
        ("Training time", _sum_step_times(frame), "sum of step times"),
        ("Engine", str(summary["engine"] or fmt.DASH), _count_processes(summary["world_size"])),
        ("Model", str(model.get("class") or fmt.DASH), str(info.get("trainer") or "")),
        ("Parameters", fmt.number(total), ""),
        ("Trainable", fmt.number(trainable), part),
        ("Steps", fmt.count(steps), f"of {fmt.count(planned)}" if planned else ""),
    ]


def _describe_resumes(starts: list[Any]) -> str:
    if len(starts) < 2:
        return ""
    times = "once" if len(starts) == 2 else f"{len(starts) - 1} times, last"
    return f"resumed {times} on {fmt.when(starts[-1])}"


def _sum_step_times(frame: pd.DataFrame) -> str:
    seconds = finite_values(frame, "train/step_seconds/total")
    return fmt.duration(seconds.sum()) if len(seconds) else fmt.DASH


def _count_processes(world_size: int | None) -> str:
    return "" if world_size is None else f"{world_size} process{'es' * (world_size != 1)}"


def _list_key_figures(
    summary: Mapping[str, Any], frame: pd.DataFrame, alerts: list[dict[str, Any]]
) -> list[Entry]:
    """Lists the run's key figures."""
    pairs = {
        key: fmt.change(summary[f"{key}_first"], summary[f"{key}_last"], 3 + ("loss" in key))
        for key in ("loss", "eval_loss", "grad_norm", "lora_ratio")
    }
    evaluations = "no evaluation" if pairs["eval_loss"] == fmt.DASH else "first → last evaluation"
    ends = "mean of first 5 → last 5 steps"
    severities = [str(a.get("severity")) for a in alerts]
    counts = [
        f"{severities.count(s)} {s}" for s in ("critical", "warning", "info") if s in severities
    ]
    return [
        (
            "Training loss",
            pairs["loss"],
            _note_nonfinite(frame, "train/loss/total") or ends,
        ),
        ("Held-out loss", pairs["eval_loss"], evaluations),
        ("Tokens per second", fmt.number(summary["tokens_per_second"]), "median"),
        ("Gradient norm", pairs["grad_norm"], _note_nonfinite(frame, "grad/norm/total") or ends),
        ("LoRA gradient ratio B/A", pairs["lora_ratio"], "median over modules, first → last"),
        ("Alerts", fmt.count(len(alerts)), ", ".join(counts) or "no rule fired"),
        ("Monitor overhead", fmt.share(summary["monitor_share"]), "of the step time"),
    ]


def _note_nonfinite(frame: pd.DataFrame, name: str) -> str:
    count = len(nonfinite_steps(frame, name))
    return f"NaN or Inf at {count:,} step{'s' * (count != 1)}" if count else ""


def _ends_broken(summary: Mapping[str, Any]) -> bool:
    """Whether the loss or the gradient is NaN or Inf at the end of the run."""
    ends = (summary["loss_last"], summary["grad_norm_last"], summary["eval_loss_last"])
    return any(value is not None and not math.isfinite(value) for value in ends)


def _add_bars(table: pd.DataFrame) -> list[Any]:
    """Returns the rows of a table, each with the width of its bar in percent."""
    width = 100 * table["share"] / table["share"].max()
    return list(table.assign(width=width.fillna(0.0)).itertuples())


def _as_mapping(value: object) -> Mapping[str, Any]:
    """Returns `value` if it is a mapping, or else an empty one: run.json may hold anything."""
    return value if isinstance(value, Mapping) else {}
