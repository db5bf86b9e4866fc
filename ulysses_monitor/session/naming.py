"""The run directory that the user names, or one named after the program that trains."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path, PurePath

from ulysses_monitor.common.errors import InputError
from ulysses_monitor.common.launch import launched_rank
from ulysses_monitor.common.notice import notify
from ulysses_monitor.common.ranks import rank
from ulysses_monitor.session.settings import WhenTaken
from ulysses_monitor.store import check_available, check_writable

__all__ = ["check_run_dir", "choose_run_dir", "name_run_dir", "program_name", "stamp_run_dir"]


def choose_run_dir(run_dir: str | Path | None, if_exists: WhenTaken) -> Path:
    """Returns the checked run directory, or names one and says so on standard error.

    Args:
        run_dir: what the user named, if anything.
        if_exists: what should happen to a run that is there.

    Raises:
        InputError: see `check_run_dir`.
    """
    is_first = launched_rank() == 0 and rank() == 0
    if run_dir is not None:
        # On other ranks, rank 0 may be recording there already.
        return check_run_dir(run_dir, if_exists if is_first else "new")
    chosen = name_run_dir(program_name())
    if is_first:
        notify(f"recording to {chosen}")
    return chosen


def check_run_dir(run_dir: str | Path, if_exists: WhenTaken) -> Path:
    """Returns `run_dir` as a path, after checking that a run can be recorded there.

    It checks at once what would otherwise fail once the model is loaded, and changes nothing.

    Args:
        run_dir: what the user named.
        if_exists: what should happen to a run that is there.

    Raises:
        InputError: it is empty, a URL, cannot be written, or is taken and must not be.
    """
    if not str(run_dir) or "://" in str(run_dir):
        raise InputError(
            f"monitor: run_dir is {str(run_dir)!r}; expected a local directory such as runs/demo; "
            "mirror= copies it to a URL"
        )
    path = Path(run_dir)
    if if_exists == "new":
        check_writable(path)
    else:
        check_available(path, if_exists)
    return path


def name_run_dir(name: str) -> Path:
    """Returns ``runs/<name>-<time>`` that does not exist; characters unfit for a folder go."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", name).strip("-.") or "run"
    now = time.time()
    while (place := stamp_run_dir(name, now)).exists():
        now += 1
    return place


def stamp_run_dir(name: str, now: float) -> Path:
    """Returns ``runs/<name>-<time>`` with local time."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"


def program_name() -> str:
    """Returns the name of the notebook, module or script that this process runs."""
    shell = _notebook_shell()
    if shell is not None:
        variables = getattr(shell, "user_ns", {})
        path = variables.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME", "")
        return PurePath(str(path)).stem or "notebook"
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m
        return str(spec.name).removesuffix(".__main__")
    script = sys.argv[0] if sys.argv else ""
    return "python" if script in ("", "-c") else PurePath(script).stem


def _notebook_shell() -> object | None:
    """Returns IPython's shell if a notebook runs in this process; imports nothing."""
    if "ipykernel" not in sys.modules:
        return None
    find = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return None if find is None else find()
