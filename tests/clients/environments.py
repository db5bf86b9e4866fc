"""Virtual environments of the clients, kept from one `make test-clients` to the next."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tests.clients.case import Client

__all__ = ["ROOT", "Environment", "prepare"]

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"  # a newer one brings CUDA packages to machines without a GPU

_VERSIONS = """
import importlib.metadata, json
found = importlib.metadata.distributions()
print(json.dumps({d.name.lower().replace("_", "-"): d.version for d in found}))
"""


class Environment:
    """A client's virtual environment.

    Args:
        folder: where it is, or will be; kept if it fits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = folder / "models"

    def python(self, *arguments: str | Path) -> str:
        """Runs its Python and returns what it prints."""
        words = [str(self.folder / "bin" / "python"), *map(str, arguments)]
        done = subprocess.run(
            words, env=self.variables(), cwd=self.folder, stdout=subprocess.PIPE, text=True
        )
        assert done.returncode == 0, f"{' '.join(words)} failed\n{done.stdout}"
        return done.stdout

    def variables(self) -> dict[str, str]:
        """Returns the environment variables in which its programs run."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ULYSSES", "PYTEST"))
        }
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", "")])
        return {**kept, "PATH": path, "VIRTUAL_ENV": str(self.folder)}

    def versions(self) -> dict[str, str]:
        """Returns the version of each installed distribution, by its name in lower case."""
        return dict(json.loads(self.python("-c", _VERSIONS)))

    def pip(self, *arguments: str | Path) -> None:
        """Runs pip in it."""
        self.python("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def prepare(client: Client, folder: Path) -> Environment:
    """Returns an environment with the client, this checkout and the models.

    What is there and unchanged is used again. This package may not replace what the client brought:
    pip gets the client's versions as constraints.
    """
    environment = Environment(folder)
    if not _is_stamped(folder / "client.stamp", _client_key(client)):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        environment.pip("install", TORCH)
        environment.pip("install", TORCH, *client.packages)
        if client.without:
            _remove(client, environment)
        (folder / "client.txt").write_text(environment.python("-m", "pip", "freeze", "--all"))
        _stamp(folder / "client.stamp", _client_key(client))
    if not _is_stamped(folder / "ours.stamp", key := _digest(_sources())):
        extras = client.ours.removeprefix("ulysses-toolkit")
        environment.pip("install", "-c", folder / "client.txt", f"{ROOT}{extras}")
        environment.pip("install", "--force-reinstall", "--no-deps", ROOT)
        _stamp(folder / "ours.stamp", key)
    scripts = [Path(__file__).with_name(name) for name in ("build_models.py", "rows.py")]
    if client.has_transformers and not _is_stamped(
        folder / "models.stamp", key := _digest(scripts)
    ):
        environment.python(scripts[0], environment.models)
        _stamp(folder / "models.stamp", key)
    return environment


def _remove(client: Client, environment: Environment) -> None:
    environment.pip("uninstall", "--yes", *client.without)
    (site,) = environment.folder.glob("lib/python*/site-packages")
    for package in client.stand_ins:
        (site / f"{package}.py").write_text('"""Stands in for a package that needs CUDA."""\n')


def _client_key(client: Client) -> str:
    return json.dumps([sys.version_info[:2], TORCH, asdict(client)])


def _sources() -> list[Path]:
    found = [p for name in ("ulysses_core", "ulysses_monitor") for p in (ROOT / name).rglob("*.*")]
    return [ROOT / "pyproject.toml", *(p for p in found if p.suffix != ".pyc" and p.is_file())]


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _is_stamped(stamp: Path, key: str) -> bool:
    return stamp.is_file() and stamp.read_text() == key


def _stamp(stamp: Path, key: str) -> None:
    stamp.write_text(key)
