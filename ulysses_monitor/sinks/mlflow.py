"""Sends metrics, settings and alerts of a run to an MLflow tracking server."""

from __future__ import annotations

import itertools
import os
import posixpath
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.masking import mask_secrets, mask_text
from ulysses_monitor.common.settings import Text, checked_arguments
from ulysses_monitor.records import Event, StepRecord
from ulysses_monitor.records.json_ready import escape_surrogates
from ulysses_monitor.sinks.arguments import Patterns, plain_url, require_library
from ulysses_monitor.sinks.selection import Selection

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["MlflowSink"]

_METRICS_A_CALL, _PARAMS_A_CALL = 1000, 100
_LONGEST_KEY, _LONGEST_PARAM, _LONGEST_TAG = 250, 6000, 5000
"""MLflow's limits, from its documentation of ``log-batch``."""

_ENDS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MlflowSink:
    """Starts an MLflow run for each start of a training, with the flattened config as parameters.

    MLflow's own environment variables hold the credentials (``MLFLOW_TRACKING_TOKEN``, or
    ``_USERNAME`` and ``_PASSWORD``) and limit how long a call waits
    (``MLFLOW_HTTP_REQUEST_TIMEOUT`` and ``MLFLOW_HTTP_REQUEST_MAX_RETRIES``).

    Args:
        tracking_uri: the server; ``MLFLOW_TRACKING_URI`` by default.
        experiment: name of the experiment; created if it does not exist.
        run_name: name of the MLflow run; that of the run directory by default.
        metrics: patterns of the metrics to send; all but modules and parameters by default.

    Raises:
        InputError: an argument is wrong, or mlflow is not installed.
    """

    name = "mlflow"

    @checked_arguments("sink mlflow")
    def __init__(
        self,
        tracking_uri: Text | None = None,
        experiment: Text = "ulysses",
        run_name: Text | None = None,
        metrics: Patterns | None = None,
    ) -> None:
        self._uri = _checked_uri(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
        self._selection = Selection(metrics)
        require_library(self.name, "mlflow")
        self._experiment, self._given_name = experiment, run_name
        self._run_name = run_name or "run"
        self._config: dict[str, str] = {}
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._status = "FAILED"

    def open(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Sets the name and the config of the run."""
        self._run_name = self._given_name or str(info.get("name") or run_dir.name)
        self._config = dict(_flatten(mask_secrets(dict(info.get("config") or {}))))

    def write(self, item: StepRecord | Event) -> None:
        """See `Sink.write`.

        Raises:
            ConnectionError: the server is unreachable; the item can be written again.
            MlflowException: the server refuses the item.
        """
        with _unreachable_as_os_error():
            client, run_id = self._connect()
            if isinstance(item, StepRecord):
                self._send(client, run_id, item)
            elif item.kind == "alert":
                key = _key(f"alert/{item.data.get('rule')}")
                message = mask_text(f"step {item.step}: {item.data.get('message')}")
                client.set_tag(run_id, key, escape_surrogates(message)[:_LONGEST_TAG])
            elif item.kind == "stop":
                self._status = _ENDS.get(str(item.data.get("status")), "FAILED")

    def _send(self, client: MlflowClient, run_id: str, record: StepRecord) -> None:
        from mlflow.entities import Metric

        time = int(record.time * 1000)
        items = self._selection.items(record)
        while batch := list(itertools.islice(items, _METRICS_A_CALL)):
            metrics = [Metric(_key(name), value, time, record.step) for name, value in batch]
            client.log_batch(run_id, metrics=metrics)

    def _connect(self) -> tuple[MlflowClient, str]:
        """Starts the MLflow run once; after an error, the next call continues from there."""
        if self._client is None:
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=self._uri)
        if self._run_id is None:
            experiment = _experiment(self._client, self._experiment)
            run = self._client.create_run(experiment, run_name=escape_surrogates(self._run_name))
            self._run_id, self._status = str(run.info.run_id), "FAILED"
        self._send_config(self._client, self._run_id)
        return self._client, self._run_id

    def _send_config(self, client: MlflowClient, run_id: str) -> None:
        from mlflow.entities import Param

        while self._config:
            items = iter(self._config.items())
            batch = [Param(*item) for item in itertools.islice(items, _PARAMS_A_CALL)]
            rest = dict(items)
            try:
                with _unreachable_as_os_error():
                    client.log_batch(run_id, params=batch)
            except ConnectionError:
                rest = self._config
                raise
            finally:
                self._config = rest  # does not send refused parameters again

    def flush(self) -> None:
        """Does nothing, because `write` sends immediately."""

    def close(self) -> None:
        """Ends the MLflow run with the status of the training.

        Raises:
            ConnectionError: the server is unreachable; the call can be repeated.
            MlflowException: the server refuses.
        """
        if self._client is not None and self._run_id is not None:
            with _unreachable_as_os_error(), _url_printing_off():
                self._client.set_terminated(self._run_id, self._status)
        self._run_id = None


def _checked_uri(uri: str | None) -> str:
    where = "sink mlflow: tracking_uri"
    if not uri:
        raise InputError(f"{where} is missing, and MLFLOW_TRACKING_URI is not set; set one of them")
    if uri.startswith("http"):
        plain_url(where, uri, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    return uri


@contextmanager
def _unreachable_as_os_error() -> Iterator[None]:
    """Raises `ConnectionError`, after which the bus retries, if the server is unreachable."""
    from mlflow.exceptions import MlflowException, RestException

    try:
        yield
    except MlflowException as error:
        if isinstance(error, RestException) and error.get_http_status_code() < 500:
            raise
        raise ConnectionError(str(error)) from error


@contextmanager
def _url_printing_off() -> Iterator[None]:
    """Stops MLflow from printing the run's URL at its end."""
    name = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _experiment(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another run has just created it
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _key(name: str) -> str:
    """Returns `name` as MLflow accepts it: a short relative path of word characters.

    A changed name gets a checksum, so that two names never become the same.
    """
    legal = re.sub(r"[^\w\-. :/]", "_", name)
    legal = posixpath.normpath(legal.replace("..", "__")).strip("/")
    if legal == name and len(name) <= _LONGEST_KEY:
        return name
    checksum = f"_{zlib.crc32(name.encode('utf-8', 'backslashreplace')):08x}"
    return legal[: _LONGEST_KEY - len(checksum)].rstrip("/") + checksum


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the keys, joined by dots, and values of nested mappings."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif path:
        yield _key(path), escape_surrogates(str(value))[:_LONGEST_PARAM]
