"""Installing this package beside another one replaces nothing that the other one brought."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.clients import test_llamafactory, test_sentence_transformers, test_swift, test_trl
from tests.clients.case import Client
from tests.clients.conftest import clients_folder
from tests.clients.environments import prepare
from tests.install.wheel import build_wheel

CLIENTS = (
    test_llamafactory.CLIENT,
    test_swift.CLIENT,
    test_trl.NEWEST,
    test_trl.OLDEST,
    test_sentence_transformers.CLIENT,
)
EXTRAS = ("", "[trainers,tensorboard,plots]")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("dist"))


def replaced(client: Client, wheel: Path, extras: str, report: Path) -> list[str]:
    """Returns the client's packages that pip would replace to install the wheel."""
    folder = clients_folder() / (client.folder or client.package)
    environment = prepare(client, folder)
    environment.pip("install", "--dry-run", "--report", report, f"{wheel}{extras}")
    chosen = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    theirs = re.findall(r"^([\w.-]+)(?:==| @ )", (folder / "client.txt").read_text(), re.MULTILINE)
    names = {_normalize(name) for name in theirs}
    assert "torch" in names
    return [f"{m['name']} {m['version']}" for m in chosen if _normalize(m["name"]) in names]


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.clients
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("extras", EXTRAS, ids=["monitor", "with_extras"])
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.folder or client.package)
def test_installing_the_wheel_replaces_no_package_of_the_client(
    client: Client, extras: str, wheel: Path, tmp_path: Path
) -> None:
    assert replaced(client, wheel, extras, tmp_path / "report.json") == []
