"""Describes the git repository of the script that trains, for run.json."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["describe_repository", "script_folder"]

_SECONDS = 2.0
"""Longest wait for one answer of git."""


def script_folder() -> Path:
    """Returns the folder of the script that runs, or the current one."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else None
    return script.resolve().parent if script is not None and script.is_file() else Path.cwd()


def describe_repository(folder: Path | None = None) -> dict[str, Any]:
    """Returns commit, branch, and whether tracked files were changed since; or what is known of it.

    Empty if there is no git, no repository or no commit. It never raises.

    Args:
        folder: a folder in the repository; by default that of the script.
    """
    try:
        where = folder or script_folder()
    except OSError:  # the current folder was removed
        return {}
    commit = _ask_git(where, "rev-parse", "HEAD")
    if not commit:
        return {}
    branch = _ask_git(where, "rev-parse", "--abbrev-ref", "HEAD")
    changes = _ask_git(where, "status", "--porcelain", "--untracked-files=no")
    about = {
        "commit": commit,
        "branch": None if branch == "HEAD" else branch,  # a commit was checked out, not a branch
        "is_dirty": None if changes is None else bool(changes),
    }
    return {name: value for name, value in about.items() if value is not None}


def _ask_git(folder: Path, *question: str) -> str | None:
    """Returns what git answers, None if it does not."""
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - git itself, with words of our own
            [git, "-C", str(folder), *question],
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # do not write into the repository
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()
