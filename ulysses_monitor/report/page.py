"""A run as one self-contained page: report.html, with no script and no external request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.files import replace_file
from ulysses_monitor.reading.reader import RunReader
from ulysses_monitor.report import formatting as fmt
from ulysses_monitor.report import tables
from ulysses_monitor.report.charts import draw_charts
from ulysses_monitor.report.plots import broken_steps, finite

__all__ = ["write_report"]

_METRICS = (
    "train/*",
    "eval/*",
    "grad/norm/*",
    "grad/clip_coef/total",
    "lora/grad_ratio_B_A/*",
    "optim/lr/*",
    "optim/exp_avg_norm/total",
    "optim/exp_avg_norm/layer/*",
    "optim/exp_avg_sq_mean/total",
    "optim/exp_avg_sq_mean/layer/*",
    "monitor/overhead_seconds/total",
)
_MOST_ALERTS, _MOST_EVENTS = 50, 500
_TEMPLATES = Path(__file__).with_name("templates")


def write_report(run: RunReader, path: Path | None = None) -> Path:
    """Writes a run's report, finished or alive, and returns where it is.

    The page needs no network, and replaces an earlier one only once it is complete.

    Args:
        run: the run.
        path: the file to write; ``report.html`` in the run directory if None.

    Raises:
        InputError: `path` is a directory, or is in none, or is None and the run lies at a URL.
    """
    path = _place(run) if path is None else Path(path)
    if path.is_dir():
        raise InputError(f"report {path}: is a directory; name a file such as report.html")
    if not path.parent.is_dir():
        raise InputError(f"report {path}: no such folder: {path.parent}")
    html = _render(run)
    with replace_file(path) as file:
        # A lone surrogate in a run's text has no UTF-8 form: it must not cost the report.
        file.write(html.encode(errors="replace"))
    return path


def _place(run: RunReader) -> Path:
    if run.location.local is None:
        raise InputError(
            f"report of {run.location}: nothing is written to a URL; name a file: --output FILE"
        )
    return run.path / "report.html"


def _render(run: RunReader) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(fmt, name) for name in ("number", "count", "share", "duration", "when")
    }
    return environment.get_template("report.html.j2").render(_context(run))


def _context(run: RunReader) -> dict[str, Any]:
    """Everything the template names; text from the run goes in as it is and is escaped there."""
    frame, info, summary = run.metrics(*_METRICS), run.info, run.summary()
    alerts = tables.alert_rows(run)
    return {
        "info": info,
        "summary": summary,
        "facts": _facts(info, summary, frame),
        "figures": _key_figures(summary, frame, alerts),
        "alerts": alerts[:_MOST_ALERTS],
        "more_alerts": len(alerts) - _MOST_ALERTS,
        "actions": tables.action_rows(run),
        "charts": draw_charts(frame, [a["step"] for a in alerts]),
        "unbalanced": list(tables.most_unbalanced(frame)["ratio"].items()),
        "largest": _with_bars(tables.largest_gradients(frame)),
        "config": json.dumps(info.get("config") or {}, indent=2, ensure_ascii=False, default=str),
        "versions": _mapping(info.get("versions")),
        "host": [(k, info[k]) for k in ("host", "platform", "python", "user", "pid") if k in info],
        "events": tables.event_rows(run, frame)[:_MOST_EVENTS],
        "written": datetime.now(UTC).timestamp(),
    }


# -- the header ----------------------------------------------------------------------------------


def _facts(
    info: Mapping[str, Any], summary: Mapping[str, Any], frame: pd.DataFrame
) -> list[tuple[str, str, str]]:
    """Label, value and a note of each fact about the run."""
    model, starts = _mapping(info.get("model")), list(info.get("starts") or [])
    steps, planned = summary["steps"], info.get("max_steps")
    all_, trainable = model.get("parameters"), model.get("trainable_parameters")
    part = f"{fmt.share(trainable / all_)} of them" if all_ and trainable is not None else ""
    resumed = f"resumed {len(starts) - 1} times, last {fmt.when(starts[-1])}" if starts[1:] else ""
    ended = f"ended {fmt.when(info['ended'])}" if info.get("ended") else ""
    return [
        ("Started", fmt.when(starts[0]) if starts else fmt.DASH, resumed or ended),
        ("Time in steps", _training_time(frame), ""),
        ("Engine", str(summary["engine"] or fmt.DASH), _processes(summary["world_size"])),
        ("Model", str(model.get("class") or fmt.DASH), str(info.get("trainer") or "")),
        ("Parameters", fmt.number(all_), ""),
        ("Trainable", fmt.number(trainable), part),
        ("Steps", fmt.count(steps), f"of {fmt.count(planned)}" if planned else ""),
    ]


def _training_time(frame: pd.DataFrame) -> str:
    seconds = finite(frame, "train/step_seconds/total")
    return fmt.duration(seconds.sum()) if len(seconds) else fmt.DASH


def _processes(world_size: int | None) -> str:
    return "" if world_size is None else f"{world_size} process{'es' * (world_size != 1)}"


def _key_figures(
    summary: Mapping[str, Any], frame: pd.DataFrame, alerts: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Label, value and a note of each key figure."""
    pairs = {
        key: fmt.change(summary[f"{key}_first"], summary[f"{key}_last"], 3 + ("loss" in key))
        for key in ("loss", "eval_loss", "grad_norm", "lora_ratio")
    }
    ends, broken = "mean of first → last 5 steps", len(broken_steps(frame, "train/loss/total"))
    kinds = [str(a.get("severity")) for a in alerts]
    noted = [f"{kinds.count(k)} {k}" for k in ("critical", "warning", "info") if k in kinds]
    return [
        ("Training loss", pairs["loss"], f"not finite at {broken} steps" if broken else ends),
        ("Held-out loss", pairs["eval_loss"], "first → last evaluation"),
        ("Tokens per second", fmt.number(summary["tokens_per_second"]), "median"),
        ("Gradient norm", pairs["grad_norm"], ends),
        ("LoRA B/A", pairs["lora_ratio"], "median over modules, first → last"),
        ("Alerts", fmt.count(len(alerts)), ", ".join(noted) or "no rule fired"),
        ("Monitor's share", fmt.share(summary["monitor_share"]), "of the step time"),
    ]


def _with_bars(table: pd.DataFrame) -> list[Any]:
    """Rows of the largest gradients, each with the width of its bar in percent."""
    width = 100 * table["share"] / table["share"].max()
    return list(table.assign(width=width.fillna(0.0)).itertuples())


def _mapping(value: object) -> Mapping[str, Any]:
    """`value` where it is a mapping, else an empty one: run.json may hold anything."""
    return value if isinstance(value, Mapping) else {}
