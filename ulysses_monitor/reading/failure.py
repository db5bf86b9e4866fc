"""Why a run failed, as it recorded it."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_monitor.reading.reader import RunReader

__all__ = ["Failure", "read_failure"]


@dataclass(frozen=True)
class Failure:
    """Why a run failed.

    Attributes:
        step: the last step.
        error: the exception, in one line; empty if unknown.
        log: the last lines of the log, oldest first.
    """

    step: int
    error: str
    log: list[str]


def read_failure(run: RunReader) -> Failure | None:
    """Returns why a run failed; None if it did not."""
    if run.info.get("status") != "failed":
        return None
    stops = run.event_list("stop")
    stop = stops[-1] if stops else {}
    log = stop.get("log")
    return Failure(
        step=int(stop.get("step") or 0),
        error=str(stop.get("error") or run.info.get("error") or "unknown"),
        log=[str(line) for line in log] if isinstance(log, list) else [],
    )
