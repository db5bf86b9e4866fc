"""The command line `ulysses`; `app` lists its commands."""

from ulysses_core.cli.app import main

__all__ = ["main"]
