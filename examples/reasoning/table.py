"""The table of accuracies, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

__all__ = ["make_table"]


def make_table(results: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Returns a row for each phase: accuracy on held-out problems, in percent, over seeds.

    Args:
        results: what `run_road` returned for each seed.
        titles: the rows: titles by the phase's name.
    """
    columns = list(results[0]["scores"][next(iter(titles))])
    lines = [
        f"| phase | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name, title in titles.items():
        cells = [
            _cell([result["scores"][name][column] for result in results]) for column in columns
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    wall, cpu = (
        fmean(result[f"{kind}_seconds"] / 60 for result in results) for kind in ("wall", "cpu")
    )
    seeds = f"{len(results)} seed{'s' * (len(results) != 1)}"
    spread = "; in brackets the lowest and the highest" if len(results) > 1 else ""
    return "\n".join(
        [
            *lines,
            "",
            f"Percent of held-out problems, mean of {seeds}{spread}. "
            f"{cpu:.1f} minutes of CPU time a seed, {wall:.1f} minutes on the clock.",
        ]
    )


def _cell(values: Sequence[float]) -> str:
    mean, low, high = (100 * number for number in (fmean(values), min(values), max(values)))
    return f"{mean:.0f}" if len(values) == 1 else f"{mean:.0f} ({low:.0f} to {high:.0f})"
