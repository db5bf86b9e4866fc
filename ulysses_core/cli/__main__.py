"""``python -m ulysses_core.cli``: what the launcher starts on every rank."""

from ulysses_core.cli.app import main

main()
