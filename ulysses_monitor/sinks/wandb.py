"""Sends metrics and alerts to Weights & Biases, online or to files for a later `wandb sync`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.masking import mask_secrets, mask_text
from ulysses_monitor.common.settings import Text, checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import escape_surrogates, to_jsonable
from ulysses_monitor.sinks.arguments import Patterns, require_library
from ulysses_monitor.sinks.selection import Selection

if TYPE_CHECKING:
    from wandb import Run, Settings

__all__ = ["WandbSink"]

_STEP = "step"
_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}


class WandbSink:
    """Starts a W&B run for each start of a training, beside any W&B run of the user's own.

    It does not record console, code, git, machine or packages. The credentials are W&B's own
    (``WANDB_API_KEY``, or those of ``wandb login``).

    Args:
        project: the W&B project.
        entity: user or team; the default of the account by default.
        run_name: name of the W&B run; that of the run directory by default.
        mode: ``online``, or ``offline`` for files in the run directory; by default,
            ``WANDB_MODE``, or ``online`` without it.
        metrics: patterns of the metrics to send; all but modules and parameters by default.
        timeout: longest time for the start, and for sending the rest at the end, in seconds.

    Raises:
        InputError: an argument is wrong, wandb is not installed, or there is no W&B account.
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
        """Sets the run directory, the name and the config of the run."""
        self._run_dir = run_dir
        self._run_name = self._given_name or str(info.get("name") or run_dir.name)
        self._config = to_jsonable(mask_secrets(dict(info.get("config") or {})))

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`.

        Raises:
            ConnectionError: the W&B run could not start, because W&B is unreachable.
            wandb.Error: the W&B run could not start for another reason.
        """
        if self._run is None:
            self._run = self._start()
        if isinstance(item, StepRecord):
            metrics = {
                escape_surrogates(name): value for name, value in self._selection.items(item)
            }
            # Each record gets its own row, because an evaluation repeats the step of a record.
            self._run.log({**metrics, _STEP: item.step})
        elif item.kind == "alert":
            self._alert(self._run, item)
        elif item.kind == "stop":
            self._failed = item.data.get("status") != "finished"

    def _alert(self, run: Run, event: Event) -> None:
        level = _LEVELS.get(str(event.data.get("severity")), "WARN")
        message = mask_text(f"step {event.step}: {event.data.get('message')}")
        title = escape_surrogates(str(event.data.get("rule")))
        run.alert(title=title, text=escape_surrogates(message), level=level)

    def _start(self) -> Run:
        import wandb
        from wandb.errors import CommError

        self._failed = True
        _check_folder(self._run_dir)
        try:
            with _process_state_restored():
                run = wandb.init(
                    project=self._project,
                    entity=self._entity,
                    name=escape_surrogates(self._run_name),
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
            stop_fn=_ignore_stop,  # without it, a click in W&B interrupts the main thread
            init_timeout=self._timeout,
            finish_timeout=self._timeout,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )

    def flush(self) -> None:
        """Does nothing, because W&B sends by itself."""

    def close(self) -> None:
        """Ends the W&B run; a later `write` starts another one."""
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(self._failed))


def _check_folder(folder: Path) -> None:
    """Creates the folder, because W&B would otherwise print a warning and use a temporary one."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"sink wandb: the run directory {folder} is not writable")


def _ignore_stop() -> None:
    """Does nothing, because `ulysses control` stops a run."""


def _mode_from_environment() -> str:
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in ("online", "offline"):
        raise InputError(f"sink wandb: WANDB_MODE is {mode!r}; allowed: online, offline")
    return mode


def _require_account() -> None:
    """Raises if there is no account, because W&B would ask for one on the terminal."""
    netrc = os.environ.get("NETRC")
    places = [Path(netrc)] if netrc else [Path.home() / ".netrc", Path.home() / "_netrc"]
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    if not any(place.exists() for place in places):
        raise InputError(
            "sink wandb: no W&B account was found; run `wandb login`, set WANDB_API_KEY, or give "
            "mode: offline"
        )


@contextmanager
def _process_state_restored() -> Iterator[None]:
    """Restores what `wandb.init` replaces in the process: exit, excepthook, environment."""
    exit_, hook, service = sys.exit, sys.excepthook, os.environ.get("WANDB_SERVICE")
    try:
        yield
    finally:
        sys.exit, sys.excepthook = exit_, hook
        if service is None:
            os.environ.pop("WANDB_SERVICE", None)
