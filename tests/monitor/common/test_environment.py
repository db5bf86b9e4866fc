from __future__ import annotations

import getpass
import json
import os
import platform

import pytest
import torch

from ulysses_monitor.common.environment import describe_environment, package_versions


def test_versions_are_those_of_installed_packages() -> None:
    versions = package_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"numpy", "pyarrow"} <= versions.keys()


def test_the_description_is_plain_data_and_holds_no_environment_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_write_me")
    described = describe_environment()
    assert (described["pid"], described["python"]) == (os.getpid(), platform.python_version())
    assert "hf_do_not_write_me" not in json.dumps(described)


def test_a_user_without_a_name_is_described_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert describe_environment()["user"] == str(os.getuid())
