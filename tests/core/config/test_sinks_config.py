"""Sinks in a config are checked when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ulysses_core.config import RunConfig
from ulysses_core.trainers.stage import load_config
from ulysses_monitor.common.errors import InputError

MINIMAL = """
model_name_or_path: some/model
dataset: a
monitor:
  sinks:
"""


def load(folder: Path, sinks: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(MINIMAL + sinks)
    return load_config(path)


def test_a_config_sets_sinks_by_name_and_import_path(tmp_path: Path) -> None:
    text = """
    - csv
    - jsonl: {metrics: [train/*]}
    - my_package.module:MySink: {size: 3}
    """
    assert load(tmp_path, text).settings.monitor.sinks == [
        "csv",
        {"jsonl": {"metrics": ["train/*"]}},
        {"my_package.module:MySink": {"size": 3}},
    ]


def test_an_override_sets_sinks(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: some/model\ndataset: a\n")
    assert load_config(path, ["monitor.sinks=[csv]"]).settings.monitor.sinks == ["csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("    - cvs", r"run.yaml: sinks: 'cvs' is not a sink \(did you mean 'csv'\?\)"),
        ("    - csv: {pth: a}", r"run.yaml: sink csv: .*did you mean 'path'"),
        ("    - csv: {path: 3}", r"run.yaml: sink csv: path is 3; expected a path"),
        ("    - webhook: {url_env: NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE is not set"),
        ("    - 3", "run.yaml: sinks: an object of type int is not a sink"),
        ("    csv: {}", "run.yaml: sinks: got dict; expected a list of sinks"),
    ],
)
def test_a_wrong_sink_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        load(tmp_path, text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "    - webhook: {url: https://hooks.example.org/s3cr3t}",
        "    - webhook: {url_env: https://hooks.example.org/s3cr3t}",
        "    webhook: {url: https://hooks.example.org/s3cr3t}",
        "    - webhook: https://hooks.example.org/s3cr3t",
    ],
)
def test_errors_do_not_show_a_secret_url(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as refused:
        load(tmp_path, text)
    assert "s3cr3t" not in str(refused.value)
