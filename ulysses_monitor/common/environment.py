"""Describes who runs a training, where, and with which versions, for run.json.

It reads no environment variables, so it records no secrets.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import socket
from typing import Any

__all__ = ["describe_environment", "package_versions"]

_PACKAGES = (
    "ulysses-toolkit",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "trl",
    "flash-attn",
    "numpy",
    "pyarrow",
)


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that matter, if installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_environment() -> dict[str, Any]:
    """Returns user, host, Python and package versions."""
    return {
        "user": _user(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": _platform(),
        "versions": package_versions(),
    }


def _platform() -> str:
    """Returns system, release, machine and C library.

    `platform.platform` starts `uname -p`, and a process that is looked for in PATH resets the
    warnings that Python has shown: the training would print them again.
    """
    libc = "".join(platform.libc_ver())
    parts = (platform.system(), platform.release(), platform.machine(), libc)
    return "-".join(filter(None, parts))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())
