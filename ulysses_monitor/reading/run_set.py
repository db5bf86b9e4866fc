"""Many runs at once: a table of runs, one frame or Arrow table of their metrics, SQL."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa

from ulysses_monitor.common.errors import InputError, UlyssesError, nearest
from ulysses_monitor.reading.long_tables import event_table, metric_table
from ulysses_monitor.reading.overview import Overview, overview
from ulysses_monitor.reading.reader import RunReader
from ulysses_monitor.reading.selection import SelectionError, Steps, Times
from ulysses_monitor.reading.sql import run_query

__all__ = ["RunSet"]

_THREADS = 8
_BROKEN = (UlyssesError, OSError, ValueError, LookupError, TypeError, pa.ArrowException)
"""What reading a damaged run may raise."""

T = TypeVar("T")


class RunSet:
    """Runs by name, in that order. One that cannot be read is left out of every answer.

    Args:
        runs: by the name that tells them apart.
        problems: by place, why what should have been a run is none.

    Attributes:
        problems: by place, why a run was left out of the last answer, or what of it is damaged.
    """

    def __init__(
        self, runs: Mapping[str, RunReader], problems: Mapping[str, str] | None = None
    ) -> None:
        self._runs = dict(runs)
        self._no_runs = dict(problems or {})
        self.problems = dict(self._no_runs)

    def __repr__(self) -> str:
        return f"<RunSet of {len(self)} runs>"

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[RunReader]:
        return iter(self._runs.values())

    def __getitem__(self, name: str) -> RunReader:
        if name not in self._runs:
            raise InputError(f"run {name!r}: not among these runs{nearest(name, self._runs)}")
        return self._runs[name]

    @property
    def names(self) -> list[str]:
        """What the runs are called: their folders' names, and their places where two are alike."""
        return list(self._runs)

    def overviews(self) -> dict[str, Overview]:
        """Each run in a few values, by when they started."""
        return _by_start(self._each(overview))

    def table(self) -> pd.DataFrame:
        """A row for each run, by when they started.

        Returns:
            A frame indexed by `run`, with the attributes of `Overview` as columns;
            `started` and `ended` are times in UTC.
        """
        return _as_table(self.overviews())

    def metrics(
        self,
        *patterns: str,
        steps: Steps | None = None,
        times: Times | None = None,
        points: int | None = None,
    ) -> pd.DataFrame:
        """As `RunReader.metrics`, of all runs; `points` are for each run.

        Returns:
            A frame indexed by `run` and `step`, a column per metric, NaN where a run has none.
            ``frame.loc["a"]`` is one run's, and ``frame["train/loss/total"].unstack("run")`` has a
            column for each run.
        """
        found = self._each(
            lambda run: run.metrics(*patterns, steps=steps, times=times, points=points)
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
    ) -> Any:
        """As `metrics`, as a `pyarrow.Table` with a row for each value that was measured.

        Returns:
            Columns `run` and `metric` (dictionaries), `step` int64, `time` float64 (seconds since
            the epoch) and `value` float32.
        """
        return metric_table(
            self._each(lambda run: run.block(*patterns, steps=steps, times=times, points=points))
        )

    def sql(self, query: str, metrics: tuple[str, ...] | str = ()) -> pd.DataFrame:
        """The answer to a query in SQL, by DuckDB, which can read and write nothing else.

        Its tables: ``runs`` is `table`, with a column `run`; ``metrics`` is `dataset`; ``events``
        has `run`, `kind`, `step`, `time` and the rest as JSON in `data`.

        Args:
            query: what DuckDB understands.
            metrics: patterns of the metrics to read; all if none is given, which may be many.

        Raises:
            InputError: DuckDB is not installed, or the query is wrong.
        """
        patterns = (metrics,) if isinstance(metrics, str) else metrics
        found = self._each(lambda run: (overview(run), run.block(*patterns), run.event_list()))
        runs = _as_table(_by_start({name: parts[0] for name, parts in found.items()}))
        tables = {
            "runs": pa.Table.from_pandas(runs.reset_index(), preserve_index=False),
            "metrics": metric_table({name: parts[1] for name, parts in found.items()}),
            "events": event_table({name: parts[2] for name, parts in found.items()}),
        }
        return run_query(query, tables)

    def _each(self, read: Callable[[RunReader], T]) -> dict[str, T]:
        """What `read` gives for each run of which it can be had."""
        with ThreadPoolExecutor(_THREADS) as pool:
            answers = list(pool.map(lambda run: _attempt(read, run), self))
        self.problems = dict(self._no_runs)
        for run, (_, problem) in zip(self, answers, strict=True):
            if problem:
                self.problems[str(run.location)] = problem
        found = zip(self._runs, answers, strict=True)
        return {name: answer[0] for name, (answer, _) in found if answer}


def _attempt(read: Callable[[RunReader], T], run: RunReader) -> tuple[tuple[T] | None, str]:
    """What `read` gives, None where the run is broken; and what is wrong with the run."""
    try:
        answer = read(run)
    except SelectionError:
        raise
    except _BROKEN as error:
        reason = str(error).removeprefix(f"run {run.location}: ") or type(error).__name__
        return None, " ".join(reason.split())
    damaged = "; ".join(f"{name}: {reason}" for name, reason in run.damaged.items())
    return (answer,), f"damaged, the rest is served: {damaged}" if damaged else ""


def _by_start(overviews: Mapping[str, Overview]) -> dict[str, Overview]:
    """Oldest first, and last those of which it is not known."""
    return dict(
        sorted(overviews.items(), key=lambda item: (item[1].started is None, item[1].started or 0))
    )


def _as_table(overviews: Mapping[str, Overview]) -> pd.DataFrame:
    index = pd.Index(list(overviews), name="run", dtype=object)
    rows = [dataclasses.asdict(found) for found in overviews.values()]
    columns = [field.name for field in dataclasses.fields(Overview)]
    table = pd.DataFrame(rows, index=index, columns=columns)
    for key in ("started", "ended"):
        seconds = table[key].astype(float)
        # Microseconds: DuckDB does not compare nanoseconds with its own times.
        moments = pd.to_datetime(seconds, unit="s", utc=True, errors="coerce")
        table[key] = moments.astype("datetime64[us, UTC]")
    return table
