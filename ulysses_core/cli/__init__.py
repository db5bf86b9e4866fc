"""The command line: `ulysses train`, `doctor`, `report`."""

from ulysses_core.cli.app import main

__all__ = ["main"]
