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
        "platform": platform.platform(),
        "versions": package_versions(),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())
