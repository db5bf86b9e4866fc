"""Metrics and alerts to Weights & Biases, online or into files for a later `wandb sync`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.masking import masked_text, without_secrets
from ulysses_monitor.common.settings import Text, checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import encodable, plain
from ulysses_monitor.sinks.arguments import Patterns, require_library
from ulysses_monitor.sinks.selection import Selection

if TYPE_CHECKING:
    from wandb import Run, Settings

__all__ = ["WandbSink"]

_STEP = "step"
_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}


class WandbSink:
    """Makes a W&B run for each start, beside any run of the user's own.

    Console, code, git, machine and packages are not recorded. Credentials are W&B's own
    (``WANDB_API_KEY``, or what ``wandb login`` left).

    Args:
        project: W&B's project.
        entity: user or team; the account's default if not given.
        run_name: the run directory's name if not given.
        mode: ``online``, or ``offline`` for files in the run directory; ``WANDB_MODE`` if not
            given, or ``online``.
        metrics: patterns of the metrics to send; all but modules and parameters if not given.
        timeout: seconds that the start, and what is left at the end, may take.

    Raises:
        InputError: an argument is wrong, wandb is not installed, or there is no account to use.
    """

    name = "wandb"

    @checked_arguments("sink wandb")
    def __init__(
        self,
        project: Text = "ulysses",
        entity: Text | None = None,
        run_name: Text | None = None,
        mode: Literal["online", "offline"] | None = None,
        metrics: Patterns | None = None,
        timeout: Annotated[float, Field(ge=1, le=86400)] = 60.0,
    ) -> None:
        self._mode = mode or _mode_from_environment()
        self._selection = Selection(metrics)
        require_library(self.name, "wandb")
        if self._mode == "online":
            _require_account()
        self._project, self._entity, self._given_name = project, entity, run_name
        self._timeout = timeout
        self._run_dir = Path()
        self._run_name = run_name or "run"
        self._config: dict[str, Any] = {}
        self._run: Run | None = None
        self._failed = True

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Learns the run directory, its name and config."""
        self._run_dir = run_dir
        self._run_name = self._given_name or str(info.get("name") or run_dir.name)
        self._config = plain(without_secrets(dict(info.get("config") or {})))

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`.

        Raises:
            ConnectionError: the run could not be started, for W&B is away.
            wandb.Error: the run could not be started for another reason.
        """
        if self._run is None:
            self._run = self._start()
        if isinstance(item, StepRecord):
            metrics = {encodable(name): value for name, value in self._selection.items(item)}
            # A row of its own each: an evaluation comes with the step of a record before it.
            self._run.log({**metrics, _STEP: item.step})
        elif item.kind == "alert":
            self._alert(self._run, item)
        elif item.kind == "stop":
            self._failed = item.data.get("status") != "finished"

    def _alert(self, run: Run, event: Event) -> None:
        level = _LEVELS.get(str(event.data.get("severity")), "WARN")
        message = masked_text(f"step {event.step}: {event.data.get('message')}")
        title = encodable(str(event.data.get("rule")))
        run.alert(title=title, text=encodable(message), level=level)

    def _start(self) -> Run:
        import wandb
        from wandb.errors import CommError

        self._failed = True
        _check_folder(self._run_dir)
        try:
            with _as_it_was():
                run = wandb.init(
                    project=self._project,
                    entity=self._entity,
                    name=encodable(self._run_name),
                    dir=str(self._run_dir),
                    config=self._config,
                    reinit="create_new",
                    settings=self._settings(),
                )
        except CommError as error:
            raise ConnectionError(str(error)) from error
        run.define_metric(_STEP, hidden=True)
        run.define_metric("*", step_metric=_STEP)
        return run

    def _settings(self) -> Settings:
        from wandb import Settings

        return Settings(
            mode="offline" if self._mode == "offline" else "online",
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            program="",
            stop_fn=_ignore,  # without it, a click in W&B interrupts the main thread
            init_timeout=self._timeout,
            finish_timeout=self._timeout,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """Ends the W&B run; a later `write` starts another one."""
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(self._failed))


def _check_folder(folder: Path) -> None:
    """W&B would take the machine's folder for temporary files instead, and print that."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"sink wandb: {folder} cannot be written")


def _ignore() -> None:
    """A run is stopped with the project's own means."""


def _mode_from_environment() -> str:
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in ("online", "offline"):
        raise InputError(f"sink wandb: WANDB_MODE is {mode!r}; allowed: online, offline")
    return mode


def _require_account() -> None:
    """Without an account, W&B would ask for one on the terminal."""
    netrc = os.environ.get("NETRC")
    places = [Path(netrc)] if netrc else [Path.home() / ".netrc", Path.home() / "_netrc"]
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    if not any(place.exists() for place in places):
        raise InputError(
            "sink wandb: no account: run `wandb login`, set WANDB_API_KEY, or give mode: offline"
        )


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Puts back what `wandb.init` replaces in the process: exit, excepthook, environment."""
    exit_, hook, service = sys.exit, sys.excepthook, os.environ.get("WANDB_SERVICE")
    try:
        yield
    finally:
        sys.exit, sys.excepthook = exit_, hook
        if service is None:
            os.environ.pop("WANDB_SERVICE", None)
