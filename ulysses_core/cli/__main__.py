"""``python -m ulysses_core.cli``, which the launcher runs on every rank."""

from ulysses_core.cli.entry import main

main()
