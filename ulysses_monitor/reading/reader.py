"""Opens a run, finished or live, and reads its metrics and events as pandas frames."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ulysses_monitor.common.errors import InputError, nearest
from ulysses_monitor.common.extras import explain_missing
from ulysses_monitor.reading.downsampling import keep_extremes
from ulysses_monitor.reading.selection import (
    Steps,
    Times,
    make_name_filter,
    select_rows,
    take_rows,
)
from ulysses_monitor.reading.sources import Source, find_source
from ulysses_monitor.reading.summary import summarize
from ulysses_monitor.reading.unmatched import (
    Missing,
    UnmatchedPatterns,
    check_missing,
    find_unmatched,
)
from ulysses_monitor.records import EVENT_KINDS
from ulysses_monitor.store import Block, Location

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RunReader", "open_run"]

_LOG = logging.getLogger(__name__)


def open_run(place: str | os.PathLike[str]) -> RunReader:
    """Opens the run at a path or URL.

    Args:
        place: a run directory, a folder of TensorBoard event files, or the output of a Hugging
            Face Trainer: its ``output_dir``, a checkpoint or a trainer_state.json. A URL such as
            ``s3://bucket/runs/sft`` needs fsspec's package for it (``s3fs``, ``gcsfs``, ...).

    Raises:
        InputError: there is no run at `place`, or it cannot be read.
    """
    source = find_source(place)
    given, local = Path(place), source.folder.local
    if local is not None and given.exists():  # a relative path stays relative
        local = given if given.is_dir() else given.parent
    return RunReader(source, local)


class RunReader:
    """A run's metrics, events and description.

    Every call reads the files again, so a reader follows a run that is still training.

    Args:
        source: reads the run's files.
        path: the run's folder on this machine; None if it is elsewhere.

    Attributes:
        logs_damage: whether to log each damaged file once; not if the caller shows `damaged`.
    """

    def __init__(self, source: Source, path: Path | None) -> None:
        self._source = source
        self._path = path
        self.logs_damage = True
        self._warned: set[str] = set()
        self._unmatched = UnmatchedPatterns()

    def __repr__(self) -> str:
        return f"<RunReader {self}>"

    def __str__(self) -> str:
        return str(self._path or self.location)

    @property
    def location(self) -> Location:
        """The folder that holds the run, on this machine or at a URL."""
        return self._source.folder

    @property
    def path(self) -> Path:
        """The folder that holds the run on this machine.

        Raises:
            InputError: the run is at a URL.
        """
        if self._path is None:
            raise InputError(f"run {self.location}: is not on this machine; expected a local run")
        return self._path

    @property
    def info(self) -> dict[str, Any]:
        """The content of run.json: config, model, engine, versions, status.

        Runs of other tools give what they have; `name` and `status` are always there.

        Raises:
            InputError: the description cannot be read.
        """
        return self._source.info()

    @property
    def damaged(self) -> Mapping[str, str]:
        """Files that the last call could not read in full, and why."""
        return self._source.damaged

    def names(self, *patterns: str) -> list[str]:
        """Returns the names of the metrics that match, without reading their values.

        Args:
            patterns: shell-style, as in `metrics`; all names if there are none.
        """
        return list(filter(make_name_filter(patterns), self._source.names()))

    def metrics(
        self,
        *patterns: str,
        steps: Steps | None = None,
        times: Times | None = None,
        points: int | None = None,
        missing: Missing = "raise",
    ) -> pd.DataFrame:
        """Returns the metrics that match shell-style patterns, such as ``"grad/norm/layer/*"``.

        Args:
            patterns: names or patterns, in which ``*`` also matches ``/``; all metrics if there are
                none.
            steps: ``(first, last)``, both included; None for no limit.
            times: ``(first, last)`` in seconds since the epoch, as datetimes or as ISO strings; a
                time without a zone is local.
            points: the largest number of rows to return, with each metric's extremes among them:
                see `ulysses_monitor.reading.downsampling.keep_extremes`.
            missing: what to do if a pattern matches no metric of the run. ``"raise"`` refuses
                patterns of which none matches, and logs a warning if some match; a run that has
                no metrics yet returns an empty frame. ``"ignore"`` leaves out what is not there.

        Returns:
            A frame indexed by `step`, with a float64 column for each metric in the order of the
            run's schema. A step that was trained twice appears once, from the later training. A
            metric that is sampled every N steps is NaN in between.

        Raises:
            InputError: no pattern matches a metric, a limit is invalid, or `points` is too small
                to keep the extremes.
        """
        return _to_frame(
            self.block(*patterns, steps=steps, times=times, points=points, missing=missing)
        )

    def block(
        self,
        *patterns: str,
        steps: Steps | None = None,
        times: Times | None = None,
        points: int | None = None,
        missing: Missing = "raise",
    ) -> Block:
        """Returns the same rows as `metrics` as arrays, with times.

        The block tells a NaN that was measured from a value that was not recorded.

        Raises:
            InputError: see `metrics`.
        """
        check_missing("metrics", missing)
        block = select_rows(self._source.read(make_name_filter(patterns)), steps, times)
        self._warn_of_damage()
        if missing == "raise" and (unmatched := find_unmatched(patterns, block.names)):
            self._unmatched.check(self, patterns, unmatched, self.names())
        return block if points is None else take_rows(block, keep_extremes(block, points))

    def times(self, *patterns: str) -> pd.Series[float]:
        """Returns the time at which each step was recorded.

        Args:
            patterns: only steps with one of these metrics; faster than all steps.

        Returns:
            Seconds since the epoch, indexed by `step`; NaN if the run has no times.

        Raises:
            InputError: no pattern matches a metric.
        """
        block = self.block(*patterns)
        return pd.Series(block.times, index=pd.Index(block.steps, name="step"), name="time")

    def plot(
        self, *patterns: str, steps: Steps | None = None, times: Times | None = None
    ) -> Figure:
        """Plots the metrics that match, such as ``run.plot("grad/norm/layer/*")``.

        Metrics that differ only in their layer, module or parameter share axes.

        Args:
            patterns: one or more names or patterns, as in `metrics`.
            steps: as in `metrics`.
            times: as in `metrics`.

        Returns:
            A figure; a notebook displays it, and ``figure.savefig("norms.png")`` saves it.

        Raises:
            InputError: a pattern matches no metric, or no step is within the limits.
        """
        with explain_missing("plot"):
            from ulysses_monitor.reading.plotting import plot_metrics

        return plot_metrics(self, patterns, steps, times)

    def events(self, kind: str | None = None, *, missing: Missing = "raise") -> pd.DataFrame:
        """Returns the events, in the order they were written.

        Args:
            kind: ``alert``, ``action``, ``checkpoint``, ...; all kinds if None.
            missing: whether to refuse a kind that is neither one of the project's nor in the run.

        Returns:
            A row for each event, with the columns `kind`, `step`, `time` and every other key that
            one of the events has.

        Raises:
            InputError: the kind is unknown.
        """
        rows = self.event_list(kind, missing=missing)
        return pd.DataFrame(rows, columns=None if rows else ["kind", "step", "time"])

    def event_list(
        self, kind: str | None = None, *, missing: Missing = "raise"
    ) -> list[dict[str, Any]]:
        """Returns the same events as `events`, each as a dictionary of its own keys.

        Raises:
            InputError: see `events`.
        """
        check_missing("events", missing)
        events = self._source.events()
        self._warn_of_damage()
        known = dict.fromkeys([*EVENT_KINDS, *(str(event["kind"]) for event in events)])
        if kind is not None and kind not in known and missing == "raise":
            raise InputError(
                f"events: kind is {kind!r}{nearest(str(kind), known)}; allowed: {', '.join(known)}"
            )
        return [event for event in events if kind is None or event["kind"] == kind]

    def alerts(self) -> pd.DataFrame:
        """Returns the events of kind ``alert``."""
        return self.events("alert")

    def summary(self) -> dict[str, Any]:
        """Summarizes the run in a few numbers.

        Returns:
            `name`, `status`, `engine`, `world_size`; `steps`, the last step; `loss_first` and
            `loss_last`, `grad_norm_first` and `grad_norm_last`, the means over the first and the
            last 5 steps; `eval_loss_first`, `eval_loss_last`, `lora_ratio_first`,
            `lora_ratio_last`; `tokens_per_second`, the median; `alerts`, the count;
            `monitor_share`, the fraction of the step time that the monitor takes. A number that
            the run did not record is None.

        Raises:
            InputError: the run's description cannot be read.
        """
        return summarize(self)

    def _warn_of_damage(self) -> None:
        for name, reason in self.damaged.items():
            if self.logs_damage and name not in self._warned:
                self._warned.add(name)
                _LOG.warning(
                    "%s: %s is damaged; reading what is left of it: %s", self.location, name, reason
                )


def _to_frame(block: Block) -> pd.DataFrame:
    index = pd.Index(block.steps, name="step")
    return pd.DataFrame(block.values, index=index, columns=list(block.names), dtype="float64")
