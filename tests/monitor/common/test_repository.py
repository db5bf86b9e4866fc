"""The git repository of the script that trains."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ulysses_monitor.common import repository
from ulysses_monitor.common.repository import describe_repository, script_folder

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(
        [shutil.which("git") or "git", "-C", folder, *who, *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "trial")
    (tmp_path / "train.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


@needs_git
def test_commit_branch_and_changes_are_told(work: Path) -> None:
    commit = git(work, "rev-parse", "HEAD")
    (work / "runs").mkdir()
    (work / "runs" / "new").touch()
    clean = {"commit": commit, "branch": "trial", "is_dirty": False}
    assert describe_repository(work) == clean
    (work / "train.py").write_text("2\n")
    assert describe_repository(work / "runs") == clean | {"is_dirty": True}
    git(work, "checkout", "-q", "--detach")
    assert describe_repository(work) == {"commit": commit, "is_dirty": True}


@needs_git
def test_no_repository_no_commit_and_no_folder_are_nothing(tmp_path: Path) -> None:
    assert describe_repository(tmp_path) == {}
    assert describe_repository(tmp_path / "missing") == {}
    git(tmp_path, "init", "-q")
    assert describe_repository(tmp_path) == {}


def test_without_git_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_repository(tmp_path) == {}


def test_a_git_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(repository, "_SECONDS", 0.2)
    assert describe_repository(tmp_path) == {}


def test_the_folder_is_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert script_folder() == tmp_path.resolve()
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert script_folder() == Path.cwd()
