"""Each extra of the built wheel, alone in a fresh environment; `make test-install`."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.install.extras import EXTRAS, Installed, format_row, install_extra, make_base

pytestmark = [pytest.mark.install, pytest.mark.timeout(1800)]

CHECK = Path(__file__).with_name("extra_check.py")
USES = {
    "trainers": {"trainers"},
    "core": {"core", "kernels", "plots", "tensorboard", "trainers"},
    "all": set(EXTRAS) - {"", "all"},
}
"""What an extra makes usable, if it is not only itself."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=list(EXTRAS), ids=lambda extra: extra or "none")
def installed(
    request: pytest.FixtureRequest, base: Path, wheel: Path, tmp_path: Path
) -> Iterator[tuple[str, Installed]]:
    folder = tmp_path / "venv"
    yield request.param, install_extra(base, folder, wheel, request.param)
    shutil.rmtree(folder)  # it has some gigabytes


def test_an_extra_brings_its_packages_and_everything_that_is_there_works(
    installed: tuple[str, Installed], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, environment = installed
    row = format_row(extra, environment)
    with capsys.disabled():
        sys.stdout.write(f"\n{row}")
    (folder := tmp_path / "work").mkdir()
    done = environment.run("python", str(CHECK), folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    used = set(done.stdout.split()) & set(EXTRAS)
    assert used >= (USES.get(extra, {extra}) - {""})  # wandb brings OpenTelemetry, too

    version = environment.run("ulysses", "--version", folder=folder)
    assert version.stdout == f"ulysses {importlib.metadata.version('ulysses-toolkit')}\n"
    assert "run" in environment.run("ulysses", "runs", ".", folder=folder).stdout
    report = environment.run("ulysses", "report", "run", folder=folder)
    if "plots" in used:
        assert (report.returncode, report.stdout) == (0, "run/report.html\n"), report.stderr
    else:
        hint = "matplotlib is not installed; run pip install 'ulysses-toolkit[plots]'"
        assert (report.returncode, report.stderr) == (2, f"ulysses: report: {hint}\n")
    assert environment.run("ulysses", "replay", "run", folder=folder).stderr == ""
