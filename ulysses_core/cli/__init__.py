"""The command line: `ulysses train`, `attach`, `doctor`, `report`, `board`, `watch`."""

from ulysses_core.cli.app import main

__all__ = ["main"]
