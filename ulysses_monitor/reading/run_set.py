"""Many runs at once: a table of runs, their metrics as one frame or Arrow table, and SQL."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa

from ulysses_monitor.common.errors import InputError, UlyssesError, nearest
from ulysses_monitor.reading.arrow_tables import build_event_table, build_metric_table
from ulysses_monitor.reading.overview import Overview, read_overview
from ulysses_monitor.reading.reader import RunReader
from ulysses_monitor.reading.selection import SelectionError, Steps, Times
from ulysses_monitor.reading.sql import run_query
from ulysses_monitor.reading.unmatched import (
    Missing,
    UnmatchedPatterns,
    check_missing,
    find_unmatched,
)

__all__ = ["RunSet"]

_THREADS = 8
_READ_ERRORS = (UlyssesError, OSError, ValueError, LookupError, TypeError, pa.ArrowException)
"""Reading a damaged run may raise any of these."""

T = TypeVar("T")


class RunSet:
    """Runs by name, in order. Every method skips a run that cannot be read.

    Args:
        runs: the runs, by names that tell them apart.
        problems: by place, why something that looks like a run could not be opened.

    Attributes:
        problems: by place, why the last call skipped a run, or which of its files are damaged.
    """

    def __init__(
        self, runs: Mapping[str, RunReader], problems: Mapping[str, str] | None = None
    ) -> None:
        self._runs = dict(runs)
        self._unopened = dict(problems or {})
        self.problems = dict(self._unopened)
        self._unmatched = UnmatchedPatterns()

    def __repr__(self) -> str:
        return f"<RunSet of {len(self)} runs>"

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[RunReader]:
        return iter(self._runs.values())

    def __getitem__(self, name: str) -> RunReader:
        if name not in self._runs:
            raise InputError(
                f"runs: {name!r} is not among these {len(self)} runs{nearest(name, self._runs)}"
            )
        return self._runs[name]

    @property
    def names(self) -> list[str]:
        """The runs' names: of their folders, or their places if folders share a name."""
        return list(self._runs)

    def overviews(self) -> dict[str, Overview]:
        """Returns each run in a few values, by name, oldest first."""
        return _sort_by_start(self._read_each(read_overview))

    def table(self) -> pd.DataFrame:
        """Returns a row for each run, oldest first.

        Returns:
            A frame indexed by `run`, with the attributes of `Overview` as columns; `started` and
            `ended` are timestamps in UTC.
        """
        return _tabulate(self.overviews())

    def metrics(
        self,
        *patterns: str,
        steps: Steps | None = None,
        times: Times | None = None,
        points: int | None = None,
        missing: Missing = "raise",
    ) -> pd.DataFrame:
        """Returns the metrics of all runs; see `RunReader.metrics`.

        Args:
            patterns: names or patterns; all metrics if there are none.
            steps: ``(first, last)``, both included; None for no limit.
            times: ``(first, last)``, both included; None for no limit.
            points: the largest number of rows for each run.
            missing: as in `RunReader.metrics`; a pattern is missing if it matches in none of the
                runs.

        Returns:
            A frame indexed by `run` and `step`, with a column for each metric; NaN where a run did
            not record it. ``frame.loc["a"]`` selects one run, and
            ``frame["train/loss/total"].unstack("run")`` has a column for each run.

        Raises:
            InputError: no pattern matches a metric of any run, a limit is invalid, or `points` is
                too small to keep the extremes.
        """
        check_missing("metrics", missing)
        found = self._read_each(
            lambda run: run.metrics(
                *patterns, steps=steps, times=times, points=points, missing="ignore"
            )
        )
        self._check_patterns(
            patterns, {run: frame.columns for run, frame in found.items()}, missing
        )
        frames = {name: frame for name, frame in found.items() if len(frame)}
        if not frames:
            return pd.DataFrame(index=pd.MultiIndex.from_arrays([[], []], names=["run", "step"]))
        return pd.concat(frames, names=["run", "step"], sort=False)

    def dataset(
        self,
        *patterns: str,
        steps: Steps | None = None,
        times: Times | None = None,
        points: int | None = None,
        missing: Missing = "raise",
    ) -> Any:
        """Returns the same metrics as `metrics`, with a row for each measured value.

        Returns:
            A `pyarrow.Table` with the columns `run` and `metric` (dictionaries), `step` (int64),
            `time` (float64, seconds since the epoch) and `value` (float32).

        Raises:
            InputError: see `metrics`.
        """
        check_missing("metrics", missing)
        found = self._read_each(
            lambda run: run.block(
                *patterns, steps=steps, times=times, points=points, missing="ignore"
            )
        )
        self._check_patterns(patterns, {run: block.names for run, block in found.items()}, missing)
        return build_metric_table(found)

    def sql(self, query: str, metrics: tuple[str, ...] | str = ()) -> pd.DataFrame:
        """Runs a SQL query over the runs in DuckDB, and returns its result.

        The query can use three tables and reach nothing else: ``runs`` is `table`, with a column
        `run`; ``metrics`` is `dataset`; ``events`` has the columns `run`, `kind`, `step`, `time`,
        and `data` with the event's other keys as JSON.

        Args:
            query: a SELECT, in DuckDB's dialect.
            metrics: patterns of the metrics to load into the table; all metrics if there are none.

        Raises:
            InputError: DuckDB is not installed, the query is wrong, or no pattern matches a metric
                of any run.
        """
        patterns = (metrics,) if isinstance(metrics, str) else metrics
        found = self._read_each(
            lambda run: (
                read_overview(run),
                run.block(*patterns, missing="ignore"),
                run.event_list(),
            )
        )
        self._check_patterns(patterns, {run: parts[1].names for run, parts in found.items()})
        runs = _tabulate(_sort_by_start({name: parts[0] for name, parts in found.items()}))
        tables = {
            "runs": pa.Table.from_pandas(runs.reset_index(), preserve_index=False),
            "metrics": build_metric_table({name: parts[1] for name, parts in found.items()}),
            "events": build_event_table({name: parts[2] for name, parts in found.items()}),
        }
        return run_query(query, tables)

    def _check_patterns(
        self,
        patterns: Sequence[str],
        found: Mapping[str, Iterable[str]],
        missing: Missing = "raise",
    ) -> None:
        """Refuses or names patterns that match in none of the runs that were `found` readable."""
        matched = {name for names in found.values() for name in names}
        unmatched = find_unmatched(patterns, matched) if missing == "raise" else []
        if unmatched:
            names = dict.fromkeys(name for run in found for name in self._runs[run].names())
            self._unmatched.check("these runs", patterns, unmatched, list(names))

    def _read_each(self, read: Callable[[RunReader], T]) -> dict[str, T]:
        """Calls `read` with each run, and returns the results of those that can be read."""
        with ThreadPoolExecutor(_THREADS) as pool:
            answers = list(pool.map(lambda run: _try_reading(read, run), self))
        self.problems = dict(self._unopened)
        for run, (_, problem) in zip(self, answers, strict=True):
            if problem:
                self.problems[str(run.location)] = problem
        found = zip(self._runs, answers, strict=True)
        return {name: answer[0] for name, (answer, _) in found if answer}


def _try_reading(read: Callable[[RunReader], T], run: RunReader) -> tuple[tuple[T] | None, str]:
    """Returns the result of `read`, None if it fails; and what is wrong with the run."""
    try:
        answer = read(run)
    except SelectionError:
        raise
    except _READ_ERRORS as error:
        reason = str(error).removeprefix(f"run {run.location}: ") or type(error).__name__
        return None, " ".join(reason.split())
    damaged = "; ".join(f"{name}: {reason}" for name, reason in run.damaged.items())
    return (answer,), f"damaged; reading what is left: {damaged}" if damaged else ""


def _sort_by_start(overviews: Mapping[str, Overview]) -> dict[str, Overview]:
    """Sorts runs oldest first; those with no known start come last."""
    return dict(
        sorted(overviews.items(), key=lambda item: (item[1].started is None, item[1].started or 0))
    )


def _tabulate(overviews: Mapping[str, Overview]) -> pd.DataFrame:
    index = pd.Index(list(overviews), name="run", dtype=object)
    rows = [dataclasses.asdict(found) for found in overviews.values()]
    columns = [field.name for field in dataclasses.fields(Overview)]
    table = pd.DataFrame(rows, index=index, columns=columns)
    for key in ("started", "ended"):
        seconds = table[key].astype(float)
        # Microseconds: DuckDB cannot compare nanoseconds with its own timestamps.
        moments = pd.to_datetime(seconds, unit="s", utc=True, errors="coerce")
        table[key] = moments.astype("datetime64[us, UTC]")
    return table
