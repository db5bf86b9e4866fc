"""The command line `ulysses`; module `app` has its commands."""

from ulysses_core.cli.entry import main

__all__ = ["main"]
